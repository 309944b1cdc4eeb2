"""The replayed decode step follows what the model is at the moment."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model, qwen

Checkpoint = Callable[..., Path]


@pytest.fixture
def model(checkpoint: Checkpoint) -> Model:
    path = checkpoint("dense")
    return load_model(path, ModelConfig.from_directory(path))


def decoded(model: Model) -> np.ndarray:
    cache = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3, 4]]), cache))
    return np.array(model(mx.array([[5]]), cache)[0, -1])


def test_replaying_gives_the_values_of_the_layers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = decoded(model)
    monkeypatch.setattr(qwen, "can_compile", lambda: False)
    assert np.abs(replayed - decoded(model)).max() <= 1e-5 * np.abs(replayed).max()


def test_changed_weights_count_from_the_next_token_on(model: Model) -> None:
    before = decoded(model)
    model.update({"norm": {"weight": 2 * model.norm.weight}, "layers": [{"input_layernorm": {"weight": mx.ones(64)}}]})
    after = decoded(model)
    assert np.abs(after - before).max() > 0.1
    whole = np.array(model(mx.array([[1, 2, 3, 4, 5]]))[0, -1])
    assert np.abs(after - whole).max() <= 1e-4 * np.abs(whole).max()
