"""The end of a long prompt with packed keys and values, beside mlx-lm: the most memory, and what is held."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.convert.planning.memory import Needs
from mlx_qwen.engine.memory import sequence_bytes
from mlx_qwen.model import Model
from mlx_qwen.model.attention import MOST_SCORE_BYTES
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.chain import Chain, Quantized, Rows
from mlx_qwen.model.memory import score_bytes
from tools.benchmarks.peer import cache_arrays, random_pair
from tools.benchmarks.small_model import small_config

_PIECE = 2048
_BITS = (None, 8, 4)
# Reads a piece behind a prompt; returns the bytes held after it.
Read = Callable[[], int]


def bench_packed(*, tokens: int = 32_768) -> Table:
    """Read the last piece of `tokens` tokens with each precision of keys and values, in both runtimes."""
    config = small_config(5, hidden_size=64, intermediate_size=64, heads=8, head_dim=16)
    ours, theirs = random_pair(config)
    ids = mx.random.randint(0, 1024, (1, min(_PIECE, tokens // 2)))
    rows = []
    for bits in _BITS:
        peak, held = _peak(partial(_reading, ours, ids, tokens, bits))
        peer_peak, peer_held = _peak(partial(_reading_of_peer, theirs, ids, tokens, bits))
        planned = sequence_bytes(config.text, tokens, item_size=4, kv_bits=bits)
        # `plan` counts in 16 bits, and bounds the scores whatever they are in.
        scores = score_bytes(config.text, ids.size, tokens, kv_bits=bits)
        most = 2 * (Needs(config.text, ids.size, bits).beside_weights(tokens) - scores)
        most += min(2 * scores, MOST_SCORE_BYTES)
        name = "fp32" if bits is None else f"{bits} bits"
        rows.append((name, *_mib(peak, most, peer_peak), f"{held / planned:.3f}", *_mib(held, peer_held)))
    note = (
        f"5 layers of width 64, one of attention with 8 heads of 32, fp32; the last {ids.size:,} of {tokens:,} tokens, "
        "behind random keys and values. MiB beside the weights; planned is what `plan` estimates for a GPU."
    )
    header = ("keys and values", f"peak, {OURS}", "planned", f"peak, {PEER}", "held / planned", "held", f"held, {PEER}")
    return Table("The end of a long prompt", note, header, rows)


def _peak(reading: Callable[[], Read]) -> tuple[int, int]:
    """The most bytes that MLX holds while a piece is read, with what was remembered; and what is held after it."""
    before = mx.get_active_memory()
    read = reading()
    mx.clear_cache()
    mx.reset_peak_memory()
    held = read()
    return mx.get_peak_memory() - before, held


def _reading(model: Model, ids: mx.array, tokens: int, bits: int | None) -> Read:
    text = model.config.text
    packing = kv_packing(text, bits)
    state = model.step(ids[:, :1], model.make_cache(kv_bits=bits).state).state
    plain = mx.random.normal((2, 1, text.num_key_value_heads, tokens - ids.size, text.head_dim))
    rows: Rows = plain if packing is None else Quantized(*mx.quantize(plain, packing.group_size, packing.bits))
    states = [replace(state, chains=(Chain.holding([rows], tokens - ids.size, packing),))]
    mx.eval(states[0].arrays())

    def read() -> int:
        # The state of before is given up, as a sequence's is.
        stepped = model.step(ids, states.pop(), last=True)
        mx.eval(stepped.hidden, stepped.state.arrays())
        return stepped.state.nbytes

    return read


def _reading_of_peer(model: Any, ids: mx.array, tokens: int, bits: int | None) -> Read:
    from mlx_lm.generate import maybe_quantize_kv_cache
    from mlx_lm.models.cache import KVCache, make_prompt_cache

    cache = make_prompt_cache(model)
    text = model.args.text_config if hasattr(model.args, "text_config") else vars(model.args)
    shape = (1, text["num_key_value_heads"], tokens - ids.size, text["head_dim"])
    model(ids[:, :1], cache=cache)
    for place, entry in enumerate(cache):
        if isinstance(entry, KVCache):
            cache[place] = KVCache()
            cache[place].update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    maybe_quantize_kv_cache(cache, 0, 32, bits)
    mx.eval(cache_arrays(cache))

    def read() -> int:
        # As `generate_step` reads a piece: what the logits alone need is not computed.
        model(ids, cache=cache)
        mx.eval(cache_arrays(cache))
        return sum(array.nbytes for array in cache_arrays(cache))

    return read


def _mib(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size / 2**20:.1f}" for size in sizes)
