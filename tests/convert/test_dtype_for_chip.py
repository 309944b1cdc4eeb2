"""The dtype "auto" is what a chip is fast in, if the weights fit into it, and it says why."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.convert import convert, describe
from mlx_qwen.convert.planning import chips
from mlx_qwen.convert.planning.chips import CHIPS
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import stored_tensors
from tests.support.foreign import edit_tensors

PROJECTION = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(checkpoint: CheckpointFactory) -> Path:
    return checkpoint("dense", dtype="bfloat16")


@pytest.mark.parametrize("chip", [chip.name for chip in CHIPS])
def test_m1_and_m2_get_float16_and_all_others_bfloat16(chip: str, source: Path) -> None:
    expected = "float16" if chip.startswith(("M1", "M2")) else "bfloat16"
    assert describe(source, dtype="auto", chip=chip).dtype == expected


def test_what_is_not_packed_is_written_in_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", dtype="auto", chip="M2 Ultra")
    stored = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert isinstance(stored, dict)
    kinds = {array.dtype for name, array in stored.items() if not name.endswith("A_log")}
    assert kinds == {mx.float16, mx.uint32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]["dtype"] == "float16"


def test_the_sources_dtype_stays_without_it(source: Path, checkpoint: CheckpointFactory) -> None:
    assert (describe(source).dtype, describe(checkpoint("dense")).dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize("value", [70_000.0, float("inf"), float("nan")])
def test_a_weight_that_overflows_float16_is_named_and_bfloat16_taken(
    value: float, source: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    edit_tensors(folder, lambda tensors: tensors[PROJECTION].view(-1)[1234].fill_(value))  # type: ignore[arg-type]
    found = describe(folder, dtype="auto", chip="M1", recipe="mixed-4-8")
    assert found.dtype == "bfloat16"
    assert "layers.0.mlp.up_proj.weight holds" in found.remarks[0]


def test_the_largest_weight_is_told_and_that_activations_were_not_checked(source: Path) -> None:
    largest = max(float(t.abs().max()) for name, t in stored_tensors(source).items() if "A_log" not in name)
    remarks = describe(source, dtype="auto", chip="M1 Max").remarks
    (remark,) = [each for each in remarks if "largest weight" in each]
    assert "activations were not checked" in remark
    assert float(remark.partition("largest weight, ")[2].split()[0]) >= largest * 0.999
    assert remark in describe(source, dtype="auto", chip="M1 Max").table()


@pytest.mark.parametrize(("device", "dtype"), [("Apple M1 Pro", "float16"), ("Apple M4", "bfloat16")])
def test_a_mac_is_asked_for_its_own_chip(
    device: str, dtype: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chips.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(chips.mx, "device_info", lambda: {"device_name": device})
    assert describe(source, dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dtype": "auto", "chip": "M9"}, "M5 Max"), ({"chip": "M1"}, "only matters"), ({"dtype": "half"}, "float16")],
)
def test_what_cannot_be_meant_is_one_clear_error(options: dict[str, object], said: str, source: Path) -> None:
    with pytest.raises(ConversionError, match=said):
        describe(source, **options)  # type: ignore[arg-type]
