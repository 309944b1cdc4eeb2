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
from mlx_qwen.model.state import GatedDeltaCache, KVCache, cache_nbytes

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    path = checkpoint("dense")
    return load_model(path, ModelConfig.from_directory(path))


def tokens(T: int, rows: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(T).integers(0, 299, (rows, T)))


def test_there_is_one_entry_a_layer_in_the_layers_order(model: Model) -> None:
    cache = model.make_cache()
    assert [isinstance(entry, GatedDeltaCache) for entry in cache] == [True, True, True, False]
    assert cache.kv_layers == [3]


def test_keys_and_values_grow_in_steps_and_come_back_whole() -> None:
    cache, rng = KVCache(), np.random.default_rng(0)
    pieces = [mx.array(rng.standard_normal((1, 2, T, 8)).astype(np.float32)) for T in (1, 254, 3, 300)]
    for piece in pieces:
        keys, values = cache.update(mx.stack([piece, 2 * piece]))
    expected = mx.concatenate(pieces, axis=2)
    assert mx.array_equal(keys, expected)
    assert mx.array_equal(values, 2 * expected)
    assert [array.shape for array in cache.arrays()] == [(2, 1, 2, 768, 8)]


def test_the_linear_layers_memory_does_not_grow(model: Model) -> None:
    sizes = []
    for T in (5, 50):
        cache = model.make_cache()
        mx.eval(model(tokens(T), cache))
        sizes.append(
            sum(array.nbytes for entry in cache if isinstance(entry, GatedDeltaCache) for array in entry.arrays())
        )
    assert sizes[0] == sizes[1] > 0


def test_the_estimate_of_a_caches_size_is_what_it_holds(model: Model) -> None:
    cache = model.make_cache()
    mx.eval(model(tokens(256), cache))
    assert cache.nbytes == cache_nbytes(model.config.text, 256, item_size=4)


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


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_rolling_back_a_recorded_call_leaves_what_the_kept_tokens_alone_leave(
    checkpoint: Checkpoint, kind: str, kept: int
) -> None:
    path = checkpoint(kind)
    model = load_model(path, ModelConfig.from_directory(path))
    ids = tokens(30)
    cache = model.make_cache()
    mx.eval(model(ids[:, :20], cache))
    cache.record()
    model(ids[:, 20:24], cache)
    cache.roll_back(kept, 4)
    cache.record(False)
    assert cache.offset == 20 + kept
    continued = np.array(model(ids[:, 24:], cache))
    expected = np.array(model(mx.concatenate([ids[:, : 20 + kept], ids[:, 24:]], axis=1)))[:, 20 + kept :]
    assert np.abs(continued - expected).max() <= 2e-4 * np.abs(expected).max()


def test_states_of_before_are_held_only_for_a_recorded_call(model: Model) -> None:
    cache = model.make_cache()
    mx.eval(model(tokens(20), cache))
    held = cache.nbytes
    linear = [entry for entry in cache if isinstance(entry, GatedDeltaCache)]
    assert all(entry._before == (None, None) for entry in linear)
    cache.record()
    mx.eval(model(tokens(30), cache))
    assert cache.nbytes == held
    with pytest.raises(ValueError, match="at most 8 tokens"):
        cache.roll_back(0, 30)


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
