"""The vision tower computes what transformers' computes, for every shape of image, within bounded memory."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import vision
from mlx_qwen.model.vision import VisionTower
from tests.support.checkpoints import Kind, reference_model, stored_tensors

Checkpoint = Callable[..., Path]
GRIDS = {
    "smallest": [Grid(1, 2, 2)],
    "square": [Grid(1, 8, 8)],
    "wide": [Grid(1, 2, 26)],
    "tall": [Grid(1, 30, 4)],
    "several": [Grid(1, 4, 6), Grid(1, 6, 4), Grid(1, 2, 2)],
    "video": [Grid(3, 4, 6)],
    "image_and_videos": [Grid(1, 6, 6), Grid(2, 4, 4), Grid(4, 2, 6)],
}


def patches(grids: list[Grid]) -> np.ndarray:
    """Random pixels of the given patches; the tiny checkpoints have 3 · 2 · 4 · 4 of them a patch."""
    total = sum(grid.patches for grid in grids)
    return np.random.default_rng(total).uniform(-1, 1, (total, 96)).astype(np.float32)


def tower(path: Path) -> VisionTower:
    loaded = load_model(path, ModelConfig.from_directory(path)).vision
    assert loaded is not None
    return loaded


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_features_equal_transformers_for_every_shape(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind)
    ours, reference = tower(path), reference_model(path).model.visual  # type: ignore[union-attr]
    for name, grids in GRIDS.items():
        pixels = patches(grids)
        with torch.no_grad():
            expected = reference(torch.tensor(pixels), grid_thw=torch.tensor(grids)).pooler_output.numpy()
        found = np.array(ours(mx.array(pixels), grids))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_images_read_together_equal_each_alone(checkpoint: Checkpoint) -> None:
    ours, grids = tower(checkpoint("dense_vl")), GRIDS["several"]
    pixels, first, alone = mx.array(patches(grids)), 0, []
    for grid in grids:
        alone.append(ours(pixels[first : first + grid.patches], [grid]))
        first += grid.patches
    assert mx.allclose(ours(pixels, grids), mx.concatenate(alone), atol=1e-5)


def test_queries_taken_in_parts_change_nothing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, grids = tower(checkpoint("dense_vl")), [Grid(1, 20, 26)]
    pixels = mx.array(patches(grids))
    whole = ours(pixels, grids)
    mx.eval(whole)
    monkeypatch.setattr(vision, "_SCORES", 1)
    assert mx.allclose(ours(pixels, grids), whole, atol=1e-5)


@pytest.mark.parametrize("scores", [1, 1200, 1 << 22])
def test_frames_of_one_shape_attend_each_on_its_own(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, scores: int
) -> None:
    ours, grids = tower(checkpoint("dense_vl")), [Grid(1, 4, 6)] * 5
    pixels = mx.array(patches(grids))
    alone = mx.concatenate([ours(pixels[24 * i : 24 * i + 24], grids[:1]) for i in range(5)])
    mx.eval(alone)
    monkeypatch.setattr(vision, "_SCORES", scores)
    assert mx.allclose(ours(pixels, grids), alone, atol=1e-5)


def test_memory_grows_with_an_images_area_and_not_with_its_square(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, peaks = tower(checkpoint("dense_vl")), []
    monkeypatch.setattr(vision, "_SCORES", 1 << 14)
    for side in (16, 32):
        grids = [Grid(1, side, side)]
        pixels = mx.array(patches(grids))
        mx.eval(pixels, ours.parameters())
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(ours(pixels, grids))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 5 * peaks[0]


def test_weights_keep_the_precision_they_are_stored_in(checkpoint: Checkpoint) -> None:
    ours = tower(checkpoint("dense_vl", dtype="bfloat16"))
    assert {x.dtype for _, x in _flat(ours)} == {mx.bfloat16}
    assert ours(mx.array(patches(GRIDS["square"])), GRIDS["square"]).dtype == mx.bfloat16


def test_bf16_features_are_near_fp32(checkpoint: Checkpoint) -> None:
    path, grids = checkpoint("dense_vl", dtype="bfloat16"), GRIDS["several"]
    pixels = patches(grids)
    with torch.no_grad():
        visual = reference_model(path).model.visual  # type: ignore[union-attr]
        expected = visual(torch.tensor(pixels), grid_thw=torch.tensor(grids)).pooler_output.numpy()
    found = np.array(tower(path)(mx.array(pixels), grids).astype(mx.float32))
    assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()


def test_a_checkpoint_without_a_tower_loads_without_one(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = checkpoint("dense_vl")
    text_only = {name: x for name, x in stored_tensors(path).items() if not name.startswith("model.visual.")}
    save_file(text_only, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    for folder in (tmp_path, checkpoint("dense")):
        assert load_model(folder, ModelConfig.from_directory(folder)).vision is None


def _flat(module: VisionTower) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(module.parameters())  # type: ignore[no-any-return]
