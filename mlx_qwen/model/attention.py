"""Gated full attention: per-head norms on q and k, partial rotary positions, a sigmoid gate on the output."""

import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from metal_kernels.attention import (
    MOST_TOKENS,
    attention,
    attention_epilogue,
    attention_of_rows,
    attention_prologue,
    packed_attention,
)
from mlx_qwen.config import TextConfig
from mlx_qwen.model.chain import Chain, Packing, Quantized, Rows, keys_and_values
from mlx_qwen.model.layers import AnyLinear, FusedLinear, RMSNorm
from mlx_qwen.model.rope import Positions, rotary

# MLX has no fused kernel for many queries at these head sizes: scores of a long context would fill the memory.
MOST_SCORE_BYTES = 1 << 30
# From this part of it on, waiting for what leads to the scores costs little beside computing them: a quarter.
_WAITING_SHARE = 4
# But for the M5's, which takes causal queries from so many on (`scaled_dot_product_attention.cpp` of MLX 0.32).
FEWEST_FUSED = 1024
_FIRST_MATRIX_UNITS = 17


class Heads(NamedTuple):
    """What enters attention: q [B, H, T, D], keys and values [2, B, Hkv, T, D], and the output's gate [B, T, H D]."""

    q: mx.array
    kv: mx.array
    gate: mx.array


class KeyValues(NamedTuple):
    """Where attention layer number `layer` writes and reads: the chains of the sequences, grown by the new tokens."""

    chains: Sequence[Chain]
    layer: int


class Attention(nn.Module):
    """Attention in three parts, so that the middle one, whose shapes grow, can stand between replayed graphs.

    `qkv_proj` has the rows of all q heads, k heads, v heads and gates, in this order.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = self.num_heads * self.head_dim, config.attention_bias
        rows = 2 * width + 2 * self.num_kv_heads * self.head_dim
        self.qkv_proj = FusedLinear(config.hidden_size, [rows], bias=bias)
        self.o_proj: AnyLinear = nn.Linear(width, config.hidden_size, bias=bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self._rotary = rotary(self.head_dim, config.rope)

    def __call__(
        self,
        x: mx.array,
        positions: Positions,
        memory: KeyValues | None = None,
        mask: mx.array | None = None,
    ) -> mx.array:
        """x [B, T, hidden] to the same shape; `mask` as in `attend`."""
        heads = self.heads(x, positions)
        return self.output(self.attend(heads, memory, mask), heads.gate)

    def heads(self, x: mx.array, positions: Positions) -> Heads:
        """Project x [B, T, hidden], normalise q and k per head in fp32 and turn them to their positions."""
        qkv = self.qkv_proj(x)
        q, kv = self._placed(qkv, positions, self.num_heads)
        return Heads(q, kv, qkv[..., -self.num_heads * self.head_dim :])

    def heads_of_last(self, x: mx.array, positions: Positions) -> Heads:
        """As `heads`, with the query and the gate of the last token alone, which are most of what is projected."""
        T = x.shape[1]
        alone = self.heads(x[:, -1:], positions.behind(T - 1))
        return alone if T == 1 else alone._replace(kv=self.keys_and_values(x, positions))

    def keys_and_values(self, x: mx.array, positions: Positions) -> mx.array:
        """The keys and values of `heads` alone, [2, B, Hkv, T, D], without computing queries and gates."""
        first = self.num_heads * self.head_dim
        rows = self.qkv_proj.rows(first, first + 2 * self.num_kv_heads * self.head_dim)
        return self._placed(rows(x), positions, 0)[1]

    def _placed(self, qkv: mx.array, positions: Positions, num_heads: int) -> tuple[mx.array, mx.array]:
        return attention_prologue(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            positions.array,
            rotary=self._rotary,
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads,
            eps=self.q_norm.eps,
        )

    def attend(self, heads: Heads, memory: KeyValues | None, mask: mx.array | None) -> mx.array:
        """Softmax attention over what is remembered and the new tokens: [B, H, T, D].

        Each chain is attended to by itself, so that sequences of different lengths never pad each other.
        `mask` is bool [B, 1, T, S] for a chain that all sequences share, or None for a causal one.
        """
        scale = self.head_dim**-0.5
        if memory is None:
            return _attention(heads.q, *keys_and_values(heads.kv), scale, mask)
        chains, count = memory.chains, len(memory.chains)
        if count == 1:
            return _attend(heads.q, *chains[0].write(memory.layer, heads.kv), scale, mask, chains[0].packing)
        each = zip(chains, mx.split(heads.kv, count, axis=1), strict=True)
        written = [chain.write(memory.layer, kv) for chain, kv in each]
        plain = [(k, v) for k, v in written if isinstance(k, mx.array) and isinstance(v, mx.array)]
        if len(plain) == count and mask is None and heads.q.shape[2] <= MOST_TOKENS:
            return attention_of_rows(heads.q, plain, scale=scale)
        attended = [
            _attend(q, *rows, scale, mask, chain.packing)
            for q, rows, chain in zip(mx.split(heads.q, count), written, chains, strict=True)
        ]
        return mx.concatenate(attended)

    def output(self, attended: mx.array, gate: mx.array) -> mx.array:
        """Gate what `attend` returned and project it: [B, T, hidden]."""
        output: mx.array = self.o_proj(attention_epilogue(attended, gate))
        return output


def _attend(
    q: mx.array, keys: Rows, values: Rows, scale: float, mask: mx.array | None, packing: Packing | None
) -> mx.array:
    if isinstance(keys, Quantized) and isinstance(values, Quantized):
        assert packing is not None, "packed rows come from a packed chain"
        return _quantized_attention(q, keys, values, scale, mask, packing)
    assert isinstance(keys, mx.array) and isinstance(values, mx.array), "keys and values are packed alike"
    return _attention(q, keys, values, scale, mask)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    """Attention of as many queries at a time as keep scores within `MOST_SCORE_BYTES`, or of all where MLX fuses."""
    T = q.shape[2]
    if mask is None and T >= FEWEST_FUSED and has_fused_prefill() and _enters_matrix_units(q.dtype):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    rows = _queries_at_once(q, (k, v), k.shape[2])
    if rows >= T:
        return attention(q, k, v, scale=scale, mask=mask)

    def attend(first: int, last: int, seen: int) -> mx.array:
        part = None if mask is None else mask[..., first:last, :seen]
        return attention(q[:, :, first:last], k[:, :, :seen], v[:, :, :seen], scale=scale, mask=part)

    return _in_blocks(T, k.shape[2], rows, attend)


def _quantized_attention(
    q: mx.array, keys: Quantized, values: Quantized, scale: float, mask: mx.array | None, packing: Packing
) -> mx.array:
    """Attention over packed keys and values, of as many queries at a time as keep scores within `MOST_SCORE_BYTES`."""
    T, S = q.shape[2], keys.packed.shape[2]
    rows, (bits, size) = _queries_at_once(q, (keys, values), S), packing
    if rows >= T:
        return packed_attention(q, keys, values, bits=bits, group_size=size, scale=scale, mask=mask)

    def attend(first: int, last: int, seen: int) -> mx.array:
        part = None if mask is None else mask[..., first:last, :seen]
        k, v = (Quantized(*(array[:, :, :seen] for array in each)) for each in (keys, values))
        return packed_attention(q[:, :, first:last], k, v, bits=bits, group_size=size, scale=scale, mask=part)

    return _in_blocks(T, S, rows, attend)


def _enters_matrix_units(dtype: mx.Dtype) -> bool:
    """Whether MLX multiplies such numbers in the M5's matrix units: fp32 does where it may be rounded to TF32."""
    return dtype != mx.float32 or os.environ.get("MLX_ENABLE_TF32", "1") != "0"


@cache
def has_fused_prefill() -> bool:
    """Whether MLX attends to many causal queries at head size 256 without storing scores: on the M5.

    The versions that do can also be told to (`force_fused`).
    """
    if "force_fused" not in (mx.fast.scaled_dot_product_attention.__doc__ or ""):
        return False
    chip = str(mx.device_info().get("architecture", "")) if mx.metal.is_available() else ""
    generation = re.match(r"applegpu_g(\d+)", chip)
    return generation is not None and int(generation[1]) >= _FIRST_MATRIX_UNITS


def _queries_at_once(q: mx.array, kv: tuple[Rows, Rows], S: int) -> int:
    """How many of the queries [B, H, T, D] have scores of S keys within `MOST_SCORE_BYTES`; at least one.

    MLX gives the arrays of a graph their memory long before it computes them: so all that leads to `q` and `kv` is
    computed before there are many scores.
    """
    B, H, T, _ = q.shape
    one_row = B * H * S * q.itemsize
    if T > 1 and one_row * T >= MOST_SCORE_BYTES // _WAITING_SHARE:
        mx.eval(q, kv)
    return max(1, MOST_SCORE_BYTES // one_row)


def _in_blocks(T: int, S: int, rows: int, attend: Callable[[int, int, int], mx.array]) -> mx.array:
    """What `attend(first, last, seen)` gives for `rows` of T queries at a time, the last of which sees `seen` keys."""
    blocks = []
    for first in range(0, T, rows):
        last = min(first + rows, T)
        blocks.append(attend(first, last, S - T + last))
        mx.eval(blocks[-1])
    return mx.concatenate(blocks, axis=2)
