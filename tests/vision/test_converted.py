"""Converted checkpoints see as well as their source: vision weights keep their precision."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from tests.vision.prompts import conversations, ours, pixels

GRIDS = conversations()["several"].images


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_features_after_4_bit_conversion_are_those_of_the_source(
    checkpoint: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    found = []
    convert(checkpoint(kind), tmp_path / "4bit", bits=4, group_size=32, dtype="float32", progress=False)
    for folder in (checkpoint(kind), tmp_path / "4bit"):
        model = load_model(folder, ModelConfig.from_directory(folder))
        assert model.vision is not None
        found.append(np.array(model.vision(mx.array(pixels(GRIDS)), GRIDS)))
    assert (found[0] == found[1]).all()


def test_a_converted_checkpoint_answers_about_images_and_goes_on(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    prompt = conversations()["mixed"]
    convert(checkpoint("moe_vl"), tmp_path / "4bit", bits=4, group_size=32, progress=False)
    model = load_model(tmp_path / "4bit", ModelConfig.from_directory(tmp_path / "4bit"))
    cache, ids = model.make_cache(), mx.array([[*prompt.ids, 5, 9]])
    pieces = [model(ids[:, :-2], cache, **ours(prompt)), model(ids[:, -2:-1], cache), model(ids[:, -1:], cache)]
    whole = np.array(model(ids, **ours(prompt)).astype(mx.float32))
    together = np.array(mx.concatenate(pieces, axis=1).astype(mx.float32))
    assert np.abs(together - whole).max() <= 0.05 * np.abs(whole).max()


@pytest.mark.parametrize(("precision", "tolerance"), [("8,32", 0.03), ("4,32", 0.4)])
def test_a_tower_packed_on_request_sees_nearly_what_its_source_sees(
    checkpoint: Callable[..., Path], tmp_path: Path, precision: str, tolerance: float
) -> None:
    source, packed = checkpoint("dense_vl"), tmp_path / "packed"
    convert(source, packed, bits_for={"vision_tower": precision}, group_size=32, dtype="float32", progress=False)
    towers, found = [], []
    for folder in (source, packed):
        tower = load_model(folder, ModelConfig.from_directory(folder)).vision
        assert tower is not None
        towers.append(tower)
        found.append(np.array(tower(mx.array(pixels(GRIDS)), GRIDS)))
    block = towers[1].blocks[0]
    layers = (block.attn.qkv, block.attn.proj, block.mlp.linear_fc1, block.mlp.linear_fc2, towers[1].merger.linear_fc2)
    assert all(isinstance(layer, nn.QuantizedLinear) for layer in layers)
    assert isinstance(towers[1].patch_embed, nn.Linear)
    assert 0 < np.abs(found[1] - found[0]).max() <= tolerance * np.abs(found[0]).max()


def test_a_pattern_that_does_not_name_the_tower_leaves_it_as_it_is(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    convert(checkpoint("dense_vl"), tmp_path / "4bit", bits_for={"mlp": 8}, group_size=32, progress=False)
    tower = load_model(tmp_path / "4bit", ModelConfig.from_directory(tmp_path / "4bit")).vision
    assert tower is not None
    assert not isinstance(tower.blocks[0].mlp.linear_fc1, nn.QuantizedLinear)
