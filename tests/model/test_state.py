"""What the cache promises: bounded memory, packed keys and values, one entry a layer."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model, attention
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import LinearState, state_nbytes

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    path = checkpoint("dense")
    return load_model(path, ModelConfig.from_directory(path))


def tokens(T: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(T).integers(0, 299, (rows, T)))


def test_there_is_one_memory_a_layer(model: Model) -> None:
    state = model.step(tokens(5), model.make_cache().state).state
    assert [type(entry) for entry in state.linear] == [LinearState] * 3
    assert len(state.chains[0].buffers()) == 1


def test_keys_and_values_grow_in_steps_and_come_back_whole() -> None:
    chain, rng = Chain.empty(1), np.random.default_rng(0)
    pieces = [mx.array(rng.standard_normal((1, 2, T, 8)).astype(np.float32)) for T in (1, 254, 3, 300)]
    for piece in pieces:
        chain = chain.grown(piece.shape[2])
        keys, values = chain.write(0, mx.stack([piece, 2 * piece]))
    expected = mx.concatenate(pieces, axis=2)
    assert mx.array_equal(keys, expected)
    assert mx.array_equal(values, 2 * expected)
    assert [array.shape for array in chain.buffers()] == [(2, 1, 2, 768, 8)]


def test_the_linear_layers_memory_does_not_grow(model: Model) -> None:
    sizes = []
    for T in (5, 50):
        cache = model.make_cache()
        mx.eval(model(tokens(T), cache))
        sizes.append(cache.state.linear_nbytes)
    assert sizes[0] == sizes[1] > 0


def test_the_estimate_of_a_caches_size_is_what_it_holds(model: Model) -> None:
    cache = model.make_cache()
    mx.eval(model(tokens(256), cache))
    assert cache.nbytes == state_nbytes(model.config.text, 256, item_size=4) + 4 * model.config.text.hidden_size


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.02), (4, 0.3)])
def test_packed_keys_and_values_give_nearly_the_same_logits(model: Model, bits: int, tolerance: float) -> None:
    ids = tokens(40, rows=2)
    expected = np.array(model(ids))
    cache = model.make_cache(kv_bits=bits, kv_group_size=32)
    pieces = [
        model(ids[:, :17], cache),
        *(model(ids[:, i : i + 1], cache) for i in range(17, 30)),
        model(ids[:, 30:], cache),
    ]
    logits = np.array(mx.concatenate(pieces, axis=1))
    assert np.abs(logits - expected).max() <= tolerance * np.abs(expected).max()
    plain = model.make_cache()
    mx.eval(model(ids, plain))
    assert cache.nbytes < plain.nbytes


def test_a_padded_batch_works_with_packed_keys_and_values(model: Model) -> None:
    ids, mask = tokens(20, rows=2), np.arange(20) >= np.array([[0], [7]])
    cache = model.make_cache(kv_bits=8, kv_group_size=32)
    batch = model(ids, cache, mask=mx.array(mask))
    solo = np.array(model(ids[1:, 7:]))
    assert np.abs(np.array(batch[1:, 7:]) - solo).max() <= 0.02 * np.abs(solo).max()


@pytest.mark.parametrize(("bits", "group_size", "word"), [(3, 32, "kv_bits"), (8, 64, "kv_group_size")])
def test_impossible_packing_is_refused(model: Model, bits: int, group_size: int, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        model.make_cache(kv_bits=bits, kv_group_size=group_size)


@pytest.mark.parametrize("padded", [False, True])
def test_long_contexts_attend_in_blocks_of_queries_to_the_same_logits(
    model: Model, monkeypatch: pytest.MonkeyPatch, padded: bool
) -> None:
    ids, mask = tokens(50, rows=2), np.arange(50) >= np.array([[0], [6 * padded]])

    def logits() -> np.ndarray:
        cache = model.make_cache()
        pieces = [model(ids[:, :30], cache, mask=mx.array(mask[:, :30]) if padded else None), model(ids[:, 30:], cache)]
        return np.array(mx.concatenate(pieces, axis=1))[mask]

    expected = logits()
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", 7 * 2 * 4 * 50 * 4)
    assert np.abs(logits() - expected).max() <= 1e-5 * np.abs(expected).max()
