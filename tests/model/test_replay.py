"""The replayed decode step follows what the model is at the moment."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model, mtp_steps, qwen
from mlx_qwen.model.state import empty_state

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


def drafted(model: Model) -> list[np.ndarray]:
    """Logits and states of two drafts after a verified run of three tokens, of which two are kept."""
    state = model.step(mx.array([[1, 2, 3, 4]]), empty_state(model.config.text, mtp=True)).state
    tape = model.step(mx.array([[5, 6, 7]]), state, tape=True).tape
    assert tape is not None
    kept = tape.keep([2])
    assert kept.last is not None
    first = model.mtp_step(kept.last, mx.array([[8]]), model.mtp_memory(kept))
    second = model.mtp_step(first.normed, mx.array([[9]]), first.memory, chained=True)
    parts = [first.logits, second.logits, kept.last, *(part for layer in kept.linear for part in layer)]
    return [np.array(part) for part in parts]


def test_drafting_and_taking_back_are_replayed_to_the_values_of_the_layers(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("dense", with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))
    replayed = drafted(model)
    for module in (qwen, mtp_steps):
        monkeypatch.setattr(module, "can_compile", lambda: False)
    for found, expected in zip(replayed, drafted(model), strict=True):
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
