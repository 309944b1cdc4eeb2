"""mlx-vlm sees with what is converted here, and this package with what mlx-vlm converts, the same to rounding."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.vision.prompts import conversations, ours, pixels

utils = pytest.importorskip("mlx_vlm.utils")
quantization = pytest.importorskip("mlx_vlm.quant_utils")
KINDS = ["dense_vl", "moe_vl"]
PRECISIONS: dict[str, dict[str, object]] = {
    "unquantized": {"quantize": False},
    "4 bits": {"bits": 4},
    "packed tower": {"bits_for": {"vision_tower": "8,32"}, "group_size": 32},
}


def mlx_vlm_convert(source: Path, target: Path, bits: int | None) -> None:
    """What mlx-vlm writes of a checkpoint in the form of the released ones, whose `text_config` names the dtype."""
    released = shutil.copytree(source, target.with_name("released"))
    config = json.loads((released / "config.json").read_text())
    config["text_config"]["dtype"] = config["dtype"]
    (released / "config.json").write_text(json.dumps(config))
    model = utils.load_model(released)
    if bits is not None:
        model, config = quantization.quantize_model(model, config, 32, bits)
    utils.save_weights(target, model)
    utils.save_config(config, target / "config.json")


def assert_both_see_the_same(folder: Path) -> None:
    """Features and logits of both runtimes, to 1e-5 of the largest, for images and a video."""
    mine, theirs = load_model(folder, ModelConfig.from_directory(folder)), utils.load_model(folder)
    assert mine.vision is not None
    for name in ("several", "wide", "video"):
        prompt = conversations()[name]
        grids, kind = prompt.images or prompt.videos, "image" if prompt.images else "video"
        patches, ids = mx.array(pixels(grids)), mx.array(prompt.input_ids)
        sizes = {f"{kind}_grid_thw": mx.array(grids)}
        assert_close(theirs.vision_tower(patches, mx.array(grids))[0], mine.vision(patches, grids))
        given = {"pixel_values": patches} if prompt.images else {"pixel_values": None, "pixel_values_videos": patches}
        assert_close(theirs(ids, mask=None, **given, **sizes).logits, mine(ids, **ours(prompt)))


def assert_close(found: mx.array, expected: mx.array) -> None:
    theirs, mine = (np.array(value.astype(mx.float32)) for value in (found, expected))
    assert np.abs(theirs - mine).max() <= 1e-5 * np.abs(mine).max()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_vlm_sees_the_same_with_what_we_convert(
    kind: str, precision: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint(kind), tmp_path / "out", progress=False, **PRECISIONS[precision])  # type: ignore[arg-type]
    assert_both_see_the_same(tmp_path / "out")


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_we_see_the_same_with_what_mlx_vlm_converts(
    kind: str, bits: int | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    mlx_vlm_convert(checkpoint(kind), tmp_path / "out", bits)
    assert_both_see_the_same(tmp_path / "out")
