"""Converted checkpoints see as well as their source: vision weights keep their precision."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
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
