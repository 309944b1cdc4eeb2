"""The vision tower sees an image once."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.generation import generate
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import Model
from mlx_qwen.model.features import FeatureCache
from mlx_qwen.model.vision import VisionTower
from mlx_qwen.prompt import Processor
from tests.vision.drawing import drawing
from tests.vision.prompts import conversations, ours, pixels

GRIDS = [Grid(1, 4, 6), Grid(1, 6, 4), Grid(1, 2, 2)]


@pytest.fixture(scope="module")
def tower(checkpoint: Callable[..., Path]) -> VisionTower:
    path = checkpoint("dense_vl")
    loaded = load_model(path, ModelConfig.from_directory(path)).vision
    assert loaded is not None
    return loaded


def test_features_are_the_towers_in_any_order(tower: VisionTower) -> None:
    cache, values = FeatureCache(tower), mx.array(pixels(GRIDS))
    expected = np.array(tower(values, GRIDS))
    assert np.allclose(cache(values[24:48], GRIDS[1:2]), expected[6:12], atol=1e-5)
    assert np.allclose(cache(values, GRIDS), expected, atol=1e-5)
    assert np.allclose(cache(values, GRIDS), expected, atol=1e-5)


def test_only_new_images_go_through_the_tower(tower: VisionTower, seen: list[list[Grid]]) -> None:
    cache, values = FeatureCache(tower), mx.array(pixels(GRIDS))
    cache(values[:24], GRIDS[:1])
    cache(values, GRIDS)
    cache(values, GRIDS)
    assert seen == [GRIDS[:1], GRIDS[1:]]


def test_the_same_pixels_in_another_shape_are_another_image(tower: VisionTower, seen: list[list[Grid]]) -> None:
    cache, values = FeatureCache(tower), mx.array(pixels(GRIDS[:1]))
    cache(values, [Grid(1, 4, 6)])
    cache(values, [Grid(1, 6, 4)])
    assert len(seen) == 2


def test_the_oldest_features_make_room(tower: VisionTower, seen: list[list[Grid]]) -> None:
    cache, values = FeatureCache(tower, most_bytes=12 * 64 * 4), mx.array(pixels(GRIDS))
    cache(values, GRIDS)
    assert cache.nbytes <= 12 * 64 * 4
    cache(values[48:], GRIDS[2:])
    assert len(seen) == 1
    cache(values[:24], GRIDS[:1])
    assert len(seen) == 2


def test_a_later_turn_about_the_same_image_does_not_run_the_tower(
    seeing: tuple[Model, Processor], seen: list[list[Grid]]
) -> None:
    image = {"type": "image", "image": drawing(44, 44)}
    for question in ("what?", "and now?"):
        generate(*seeing, [{"role": "user", "content": [image, question]}], temperature=0, max_tokens=2)  # type: ignore[list-item]
    assert len(seen) == 1


def test_new_weights_see_the_image_anew(checkpoint: Callable[..., Path], seen: list[list[Grid]]) -> None:
    path, prompt = checkpoint("dense_vl"), conversations()["one_image"]
    model = load_model(path, ModelConfig.from_directory(path))
    before = model(mx.array(prompt.input_ids), **ours(prompt))
    assert model.vision is not None
    model.update({"vision": {"pos_embed": model.vision.pos_embed[::-1]}})
    after = model(mx.array(prompt.input_ids), **ours(prompt))
    assert len(seen) == 2
    assert mx.abs(after - before).max().item() > 1e-3
