"""What is packed in one recipe converts to another as the values that it stands for would."""

import json
from pathlib import Path
from typing import Literal

import mlx.core as mx
import pytest

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.mlx_folders import Arrays, companion_arrays, main_arrays

Settings = dict[str, int | str]
PARTS = ("weight", "scales", "biases")

pytestmark = pytest.mark.filterwarnings("ignore:.*packed again")


def arrays_of(folder: Path) -> Arrays:
    return main_arrays(folder) | companion_arrays(folder)


def settings_of(folder: Path) -> dict[str, Settings]:
    """The precision of every packed matrix, as config.json says it: its own, or the one for all."""
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    common = {key: stated[key] for key in ("bits", "group_size", "mode")}
    packed = [name.removesuffix(".scales") for name in arrays_of(folder) if name.endswith(".scales")]
    return {base: stated.get(base, common) for base in packed}


def parts_of(arrays: Arrays, base: str) -> list[mx.array]:
    return [arrays[f"{base}.{part}"] for part in PARTS if f"{base}.{part}" in arrays]


def unpacked(arrays: Arrays, base: str, settings: Settings) -> mx.array:
    """What MLX makes of a packed matrix."""
    return mx.dequantize(*parts_of(arrays, base), **settings, dtype=mx.float32)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mixed-4-8", "4bit"),
        ("mixed-4-8", "mixed-3-6"),
        ("mixed-3-6", "6bit"),
        ("mixed-4-8", "mxfp4"),
        ("mxfp8", "4bit"),
    ],
)
def test_another_recipe_packs_the_values_of_the_first(
    first: str, second: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("moe", with_mtp=True), tmp_path / "first", recipe=first)
    convert(tmp_path / "first", tmp_path / "second", recipe=second, quantizer="rtn")
    before, after = arrays_of(tmp_path / "first"), arrays_of(tmp_path / "second")
    had, has = settings_of(tmp_path / "first"), settings_of(tmp_path / "second")
    assert had.keys() == has.keys()
    changed = [base for base in has if had[base] != has[base]]
    assert len(changed) > 10
    for base in has:
        expected = parts_of(before, base)
        if base in changed:
            expected = mx.quantize(unpacked(before, base, had[base]), **has[base])
        found = parts_of(after, base)
        assert all(mx.array_equal(*pair) for pair in zip(found, expected, strict=True)), base


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_unpacked_a_mixed_recipe_is_the_values_that_it_stands_for(
    dtype: Literal["float16", "bfloat16", "float32"], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("moe", with_mtp=True), tmp_path / "mixed", recipe="mixed-4-8")
    convert(tmp_path / "mixed", tmp_path / "plain", dequantize=True, dtype=dtype)
    mixed, plain = arrays_of(tmp_path / "mixed"), arrays_of(tmp_path / "plain")
    had = settings_of(tmp_path / "mixed")
    assert {settings["bits"] for settings in had.values()} == {4, 8}
    for base, settings in had.items():
        expected = unpacked(mixed, base, settings).astype(getattr(mx, dtype))
        assert mx.array_equal(plain[f"{base}.weight"], expected), base
