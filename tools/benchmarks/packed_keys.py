"""A whole long prompt with packed keys and values, beside mlx-lm: the most memory, and what is held in the end."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.planning.memory import Needs
from mlx_qwen.engine.engine import Engine, Limits
from mlx_qwen.engine.memory import sequence_bytes
from mlx_qwen.model import Model
from mlx_qwen.model.memory import KV_GROUP_SIZE, score_bytes
from tools.benchmarks.peer import cache_arrays, random_pair
from tools.benchmarks.stepping import computed, request

# As mlx-lm's default.
_PIECE = 2048
_BITS = (None, 8, 4)
_ITEM = 4


def bench_packed(*, tokens: int = 32_768, scores: bool = True) -> Table:
    """Read `tokens` tokens with each precision of keys and values, in both runtimes.

    With `scores` the attention layer has one behind it, so that all tokens attend; as the last one it attends for the
    prompt's last token alone, in both runtimes, and keys and values are most of what is held.
    """
    layers, heads, kv_heads, head_dim = (5, 2, 1, 32) if scores else (4, 8, 2, 256)
    config = _config(layers, heads, kv_heads, head_dim)
    ours, theirs = random_pair(config)
    ids = np.random.default_rng(0).integers(0, config.text.vocab_size, tokens).tolist()
    rows = []
    for bits in _BITS:
        peak, held = _peak(partial(_read, ours, ids, bits))
        peer_peak, peer_held = _peak(partial(_read_by_peer, theirs, ids, bits, min(KV_GROUP_SIZE, head_dim)))
        planned = sequence_bytes(config.text, tokens, item_size=_ITEM, kv_bits=bits)
        most = Needs(config.text, _PIECE, bits, _ITEM).reading(tokens)
        if not scores:
            most -= score_bytes(config.text, min(_PIECE, tokens), tokens, kv_bits=bits, item_size=_ITEM)
        name = "fp32" if bits is None else f"{bits} bits"
        rows.append((name, *_mib(peak, most, peer_peak), f"{held / planned:.3f}", *_mib(held, peer_held)))
    attends = "all tokens attend" if scores else "the last layer, where the last token alone attends"
    note = (
        f"{layers} layers of width 64, one of attention with {heads} heads of {head_dim} that share {kv_heads}: "
        f"{attends}; fp32. MiB beside the weights; planned is what `plan` estimates for a GPU."
    )
    header = ("keys and values", f"peak, {OURS}", "planned", f"peak, {PEER}", "held / planned", "held", f"held, {PEER}")
    return Table(f"A prompt of {tokens:,} tokens", note, header, rows)


def _config(layers: int, heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    """0.8B's architecture, narrow but for its attention heads."""
    changes = {
        **{"hidden_size": 64, "intermediate_size": 64, "vocab_size": 1024},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim},
        **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
        **{"linear_key_head_dim": 32, "linear_value_head_dim": 32},
    }
    return reduced("0.8B", num_layers=layers, changes=changes)


def _peak(read: Callable[[], int]) -> tuple[int, int]:
    """The most bytes that MLX holds while `read` reads a prompt, beside those of before; and those held in the end."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    held = read()
    return mx.get_peak_memory() - before, held


def _read(model: Model, ids: list[int], bits: int | None) -> int:
    """Bytes of the state, once the first token of the answer is there."""

    def run() -> int:
        # Pieces as large as mlx-lm's, however little memory this machine has.
        engine = Engine(model, Limits(piece_bytes=1 << 40))
        sequence = request(model, ids, max_tokens=1)
        sequence.kv_bits, sequence.step_size = bits, _PIECE
        engine.submit(sequence)
        while not sequence.written:
            engine.step()
        assert sequence.state is not None, "it has read its prompt"
        return sequence.state.nbytes

    return computed(run)


def _read_by_peer(model: Any, ids: list[int], bits: int | None, group_size: int) -> int:
    """As `_read`, of mlx-lm, as its `generate` reads a prompt whose keys and values are packed from the start."""
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    answer = generate_step(
        mx.array(ids),
        model,
        max_tokens=1,
        prompt_cache=cache,
        kv_bits=bits,
        kv_group_size=group_size,
        quantized_kv_start=0,
    )
    next(answer)
    return sum(array.nbytes for array in cache_arrays(cache))


def _mib(*sizes: int) -> tuple[str, ...]:
    return tuple(f"{size / 2**20:.1f}" for size in sizes)
