"""What a sequence needs beside the weights is what MLX really holds."""

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.released import SIZES, reduced, released
from mlx_qwen.config import TextConfig
from mlx_qwen.convert.planning import memory
from mlx_qwen.model.chain import Chain, Packing

KIB_PER_TOKEN = dict(zip(SIZES, (12, 12, 32, 32, 64, 20, 24, 30), strict=True))
GIB_AT_FULL_CONTEXT = dict(zip(SIZES, (3, 3, 8, 8, 16, 5, 6, 7.5), strict=True))
STATE_MIB = dict(zip(SIZES, (18, 18, 48, 48, 144, 60, 144, 180), strict=True))


def keys_and_values(text: TextConfig, tokens: int) -> mx.array:
    return mx.zeros((2, 1, text.num_key_value_heads, tokens, text.head_dim), mx.bfloat16)


@pytest.mark.parametrize("name", SIZES)
def test_keys_and_values_of_a_size_take_the_known_bytes(name: str) -> None:
    text = released(name).text
    assert memory.kv_bytes(text, 1) == KIB_PER_TOKEN[name] * 1024
    assert memory.kv_bytes(text, 262_144) == GIB_AT_FULL_CONTEXT[name] * 2**30


@pytest.mark.parametrize("name", SIZES)
def test_the_state_of_a_size_takes_the_known_bytes(name: str) -> None:
    assert memory.recurrent_bytes(released(name).text) == STATE_MIB[name] * 2**20


def test_the_state_is_counted_with_the_last_rows_of_the_convolutions() -> None:
    text = released("0.8B").text
    rows = 18 * 3 * (3 * 16 * 128) * 2
    assert memory.state_bytes(text) == memory.recurrent_bytes(text) + rows


@pytest.mark.parametrize("tokens", [1, 256, 300])
def test_held_keys_and_values_are_those_of_a_real_cache(tokens: int) -> None:
    text = reduced("0.8B", num_layers=4, changes={}).text
    chain = Chain.empty(1).grown(tokens)
    chain.write(0, keys_and_values(text, tokens))
    assert memory.held_kv_bytes(text, tokens) == sum(array.nbytes for array in chain.buffers())


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_keys_and_values_are_those_of_a_real_cache(bits: int) -> None:
    text = reduced("0.8B", num_layers=4, changes={}).text
    chain = Chain.empty(1, Packing(bits, memory.KV_GROUP_SIZE)).grown(300)
    chain.write(0, keys_and_values(text, 300))
    assert memory.held_kv_bytes(text, 300, kv_bits=bits) == sum(array.nbytes for array in chain.buffers())


def test_scores_are_what_mlx_holds_while_many_queries_attend() -> None:
    text = reduced("0.8B", num_layers=4, changes={}).text
    tokens, context = 64, 8192
    k, v = (mx.zeros((1, text.num_key_value_heads, context, text.head_dim), mx.bfloat16) for _ in range(2))
    q = mx.zeros((1, text.num_attention_heads, tokens, text.head_dim), mx.bfloat16)
    mx.eval(q, k, v)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask="causal"))
    held = mx.get_peak_memory() - before
    assert held == pytest.approx(memory.score_bytes(text, tokens, context), rel=0.2)


def test_scores_of_heads_that_mlx_fuses_take_no_memory_unless_packed() -> None:
    text = reduced("0.8B", num_layers=4, changes={"head_dim": 128}).text
    assert memory.score_bytes(text, 64, 1024) == 0
    assert memory.score_bytes(text, 64, 1024, kv_bits=8) > 0


def test_keys_and_values_of_one_layer_are_there_twice_where_they_outgrow_their_room() -> None:
    """A chain that has no room left: the most memory while one layer after the other is written."""
    text = reduced("0.8B", num_layers=16, changes={}).text
    layers, context = text.layer_types.count("full_attention"), 4096
    chain = Chain.holding([keys_and_values(text, context) for _ in range(layers)], context)
    mx.eval(chain.buffers())
    grown, new = chain.grown(1), keys_and_values(text, 1)
    mx.reset_peak_memory()
    for layer in range(layers):
        mx.eval(grown.write(layer, new))
    above = mx.get_peak_memory() - mx.get_active_memory()
    assert above == pytest.approx(memory.growth_bytes(text, context + 1), rel=0.1)


@pytest.mark.parametrize("name", SIZES)
def test_reading_more_at_once_or_behind_more_context_takes_more(name: str) -> None:
    text = released(name).text
    steps = [memory.prefill_bytes(text, tokens, 32_768) for tokens in (64, 512, 2048)]
    contexts = [memory.prefill_bytes(text, 512, context) for context in (512, 4096, 262_144)]
    assert steps == sorted(set(steps))
    assert contexts == sorted(contexts)
