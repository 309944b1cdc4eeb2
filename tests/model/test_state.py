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
from mlx_qwen.model.chain import Chain, Packing, Quantized
from mlx_qwen.model.rope import Positions
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


@pytest.mark.parametrize("packing", [None, Packing(8, 32)], ids=["plain", "packed"])
def test_a_lent_chain_stays_what_it_is_and_changes_nothing_for_those_that_go_on(packing: Packing | None) -> None:
    rng = np.random.default_rng(0)

    def written(chain: Chain, T: int) -> Chain:
        longer = chain.grown(T)
        longer.write(0, mx.array(rng.standard_normal((2, 1, 2, T, 32)).astype(np.float32)))
        mx.eval(longer.buffers())
        return longer

    def rows(chain: Chain) -> list[np.ndarray]:
        held = chain.read(0)
        return [np.array(part) for part in (held if isinstance(held, Quantized) else [held])]

    short = written(Chain.empty(1, packing), 40)
    long = written(short, 300)
    lent, before, capacity = long.lent(), rows(long), long.capacity
    assert short.is_shared
    del long
    assert not short.is_shared
    other = written(short, 290)
    assert (other.place, other.capacity) == (short.place, capacity)
    assert lent.place != short.place
    for chain, length in ((lent, 340), (other, 330)):
        assert chain.length == length
        assert chain.capacity == {part.shape[-2] for part in chain.buffers()}.pop()
    assert all(np.array_equal(*pair) for pair in zip(rows(lent), before, strict=True))
    assert not all(
        np.array_equal(now[..., :330, :], then[..., :330, :]) for now, then in zip(rows(other), before, strict=True)
    )


def test_keys_and_values_of_a_known_length_lie_where_they_were_first_written() -> None:
    chain, rng = Chain.empty(1, Packing(8, 32)), np.random.default_rng(0)
    pieces = [mx.array(rng.standard_normal((2, 1, 2, T, 32)).astype(np.float32)) for T in (200, 300, 101, 1)]
    shapes = []
    for piece in pieces:
        chain = chain.grown(piece.shape[3], room=601)
        keys, _ = chain.write(0, piece)
        shapes.append({part.shape[-2] for part in chain.buffers()})
    assert shapes == [{768}] * 4
    assert isinstance(keys, Quantized)
    expected = mx.quantize(mx.concatenate(pieces, axis=3)[0], 32, 8)
    assert all(mx.array_equal(*each) for each in zip(keys, expected, strict=True))


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


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_long_contexts_attend_in_blocks_of_queries_to_the_same_logits(
    model: Model, monkeypatch: pytest.MonkeyPatch, padded: bool, kv_bits: int | None
) -> None:
    ids, mask = tokens(50, rows=2), np.arange(50) >= np.array([[0], [6 * padded]])

    def logits() -> np.ndarray:
        cache = model.make_cache(kv_bits=kv_bits, kv_group_size=kv_bits and 32)
        pieces = [model(ids[:, :30], cache, mask=mx.array(mask[:, :30]) if padded else None), model(ids[:, 30:], cache)]
        return np.array(mx.concatenate(pieces, axis=1))[mask]

    expected = logits()
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", 7 * 2 * 4 * 50 * 4)
    assert np.abs(logits() - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_queries_bound_the_memory_of_their_scores(monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    q, kv = mx.random.normal((1, 4, 512, 32)), mx.random.normal((1, 2, 1024, 32))
    held = Quantized(*mx.quantize(kv, 32, 8))
    mx.eval(q, kv, held)
    whole = 4 * 512 * 1024 * 4

    def peak() -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        if packed:
            mx.eval(attention._quantized_attention(q, held, held, 1.0, None, Packing(8, 32)))
        else:
            mx.eval(attention._attention(q, kv, kv, 1.0, None))
        return mx.get_peak_memory() - before

    assert peak() > whole
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", whole // 16)
    assert peak() < whole // 4


@pytest.mark.parametrize("packed", [False, True])
def test_what_leads_to_the_queries_is_gone_before_there_are_scores(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    kv, x = mx.random.normal((1, 2, 1024, 32)), mx.random.normal((1, 4, 512, 32))
    held = Quantized(*mx.quantize(kv, 32, 8))
    mx.eval(kv, x, held)
    scores = 4 * 512 * 1024 * 4
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", 2 * scores)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    # Through an array as large as the scores.
    q = mx.concatenate([x] * 32, axis=-1).reshape(1, 4, 512, 32, 32).sum(axis=3)
    if packed:
        mx.eval(attention._quantized_attention(q, held, held, 1.0, None, Packing(8, 32)))
    else:
        mx.eval(attention._attention(q, kv, kv, 1.0, None))
    assert mx.get_peak_memory() - before < 1.5 * scores


@pytest.mark.parametrize("axes", [False, True])
def test_the_last_tokens_query_and_gate_are_those_among_all(model: Model, axes: bool) -> None:
    layer, x = model.layers[3].self_attn, mx.random.normal((2, 11, model.config.text.hidden_size))
    three = mx.array(np.random.default_rng(0).integers(0, 50, (3, 2, 11))) if axes else None
    place = Positions(mx.array([5, 9]), three)
    every, alone = layer.heads(x, place), layer.heads_of_last(x, place)
    assert alone.q.shape[2] == alone.gate.shape[1] == 1
    for expected, found in zip((every.q[:, :, -1:], every.kv, every.gate[:, -1:]), alone, strict=True):
        assert mx.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_packed_attention_is_that_of_the_unpacked_keys_and_reads_them_once_a_key_head(
    monkeypatch: pytest.MonkeyPatch, T: int, limit: int
) -> None:
    B, H, Hkv, D, S = 2, 6, 2, 64, 23
    q, kv = (
        mx.random.normal((B, H, T, D), key=mx.random.key(1)),
        mx.random.normal((2, B, Hkv, S, D), key=mx.random.key(2)),
    )
    packed = [Quantized(*mx.quantize(part, 32, 8)) for part in kv]
    k, v = (np.array(mx.dequantize(*part, 32, 8)) for part in packed)
    scores = np.einsum("bgntd,bgsd->bgnts", np.array(q).reshape(B, Hkv, H // Hkv, T, D), k) * D**-0.5
    scores = np.where(np.arange(S) <= np.arange(S - T, S)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("bgnts,bgsd->bgntd", weights / weights.sum(-1, keepdims=True), v).reshape(B, H, T, D)
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", limit)
    multiplied, matmul = [], mx.quantized_matmul

    def noted(x: mx.array, weight: mx.array, *rest: mx.array, **how: bool) -> mx.array:
        multiplied.append((x.shape[:-2], weight.shape[:-2]))
        return matmul(x, weight, *rest, **how)

    monkeypatch.setattr(mx, "quantized_matmul", noted)
    found = attention._quantized_attention(q, *packed, D**-0.5, None, Packing(8, 32))
    assert np.abs(np.array(found) - expected).max() < 1e-5
    assert set(multiplied) == {((B, Hkv), (B, Hkv))}


@pytest.mark.parametrize(
    ("chip", "option", "tf32", "calls"),
    [
        ("applegpu_g16s", "force_fused", "1", 4),
        ("applegpu_g17g", "force_fused", "1", 1),
        ("applegpu_g18d", "force_fused", "1", 1),
        ("", "force_fused", "1", 4),
        ("applegpu_g17g", "", "1", 4),
        ("applegpu_g17g", "force_fused", "0", 4),
    ],
    ids=["M4", "M5", "later", "no Metal", "an MLX before", "M5 in full fp32"],
)
def test_blocks_of_queries_never_stand_in_for_a_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, chip: str, option: str, tf32: str, calls: int
) -> None:
    monkeypatch.setenv("MLX_ENABLE_TF32", tf32)
    q, kv = mx.zeros((1, 2, 1024, 8)), mx.zeros((1, 1, 1100, 8))
    monkeypatch.setattr(attention, "MOST_SCORE_BYTES", 256 * 2 * 1100 * 4)
    monkeypatch.setattr(mx.metal, "is_available", lambda: bool(chip))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": chip})
    attention.has_fused_prefill.cache_clear()
    made, whole = [], mx.fast.scaled_dot_product_attention

    def attend(*given: mx.array, **how: bool) -> mx.array:
        made.append(1)
        return whole(*given, **how)

    attend.__doc__ = option
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    attention._attention(q, kv, kv, 1.0, None)
    few = len(made)
    attention._attention(q[:, :, :1000], kv, kv, 1.0, None)
    attention.has_fused_prefill.cache_clear()
    assert (few, len(made) - few) == (calls, 4)
