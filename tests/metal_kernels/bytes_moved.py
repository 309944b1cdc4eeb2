"""Device bytes of every kernel at real layer shapes: `python -m tests.metal_kernels.bytes_moved`, which needs no GPU;
with numbers of tokens after it, of attention to contexts of these lengths.

The emulator counts 64-byte lines, once a launch and once a threadgroup; the minimum is every input and output once, of
gathered matrices the chosen ones. mlx-lm's prefill kernel runs through the same emulator.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metal_kernels.attention import Rotary, attention, attention_epilogue, attention_prologue, packed_attention
from metal_kernels.gated_delta.rule.prefill import gated_delta_prefill
from metal_kernels.moe_dispatch import ExpertWeights, Routing, SparseWeights, route, sparse_mlp
from metal_kernels.norm import add_rms_norm
from mlx_qwen.bench.table import Table
from mlx_qwen.checkpoint.released import released
from mlx_qwen.config import TextConfig
from mlx_qwen.model.memory import KV_GROUP_SIZE, kv_bytes
from tests.metal_emulator import emulated
from tests.metal_emulator.report import LaunchRecord
from tests.metal_kernels.gated_delta.mixer_calls import call, layer_inputs
from tests.metal_kernels.gated_delta.rule_oracle import random_inputs

_DTYPE = mx.bfloat16
_EXPERTS_HELD = 16


@dataclass(frozen=True)
class Moved:
    """Bytes of one launch: `minimum` to move at least, and what it moved by the two counts."""

    kernel: str
    minimum: int
    per_launch: int
    per_threadgroup: int

    @property
    def row(self) -> tuple[str, ...]:
        ratios = (self.per_launch / self.minimum, self.per_threadgroup / self.minimum)
        return (self.kernel, f"{self.minimum:,}", *(f"{ratio:.3f}" for ratio in ratios))


def moved(launch: LaunchRecord, saved: int = 0) -> Moved:
    """What `launch` moved; `saved` bytes of its buffers need not be read."""
    buffers = launch.buffers.values()
    return Moved(
        launch.kernel.removeprefix("mlx_qwen_"),
        sum(buffer.size for buffer in buffers) - saved,
        sum(buffer.unique_read + buffer.unique_written for buffer in buffers),
        sum(buffer.read + buffer.written for buffer in buffers),
    )


def launches(run: Callable[[], object]) -> list[LaunchRecord]:
    """The launches of `run` on the Metal backend, with their bytes."""
    os.environ["MLX_QWEN_KERNELS"] = "metal"
    with emulated(checked=True) as report:
        mx.eval(run())
    return report.launches


def normal(*shape: int) -> mx.array:
    values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5
    return mx.array(values).astype(_DTYPE)


def decode_kernels(text: TextConfig) -> list[Moved]:
    """Every kernel of a decoded token, at the layer shapes of `text`."""
    hidden, H, Hkv, D = text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim
    mixer = layer_inputs(
        1,
        Hk=text.linear_num_key_heads,
        Hv=text.linear_num_value_heads,
        Dk=text.linear_key_head_dim,
        Dv=text.linear_value_head_dim,
        hidden=hidden,
        dtype=_DTYPE,
    )
    rows, factor, rotary = normal(1, 1, 2 * (H + Hkv) * D), mx.ones(D), Rotary(dims=64, theta=1e7)
    heads = {"rotary": rotary, "num_heads": H, "num_kv_heads": Hkv, "eps": 1e-6}
    unread = rows.nbytes * H // (2 * (H + Hkv))
    found = [
        moved(*launches(lambda: call(**mixer)[:3])),
        moved(*launches(lambda: add_rms_norm(mx.zeros((1, hidden)), normal(1, hidden), mx.ones(hidden), 1e-6))),
        moved(*launches(lambda: attention_prologue(rows, factor, factor, mx.array(9), **heads)), unread),
        moved(*launches(lambda: attention_epilogue(normal(1, H, 1, D), normal(1, 1, H * D)))),
    ]
    return found + (moe_kernels(text) if text.moe else [])


def moe_kernels(text: TextConfig) -> list[Moved]:
    """Router, gate+up and down+combine at 4 bits, with fewer experts than the model has: the others are not read."""
    assert text.moe is not None, "only sparse models have experts"
    hidden, inner, k = text.hidden_size, text.moe.moe_intermediate_size, text.moe.num_experts_per_tok

    def packed(*shape: int) -> ExpertWeights:
        return ExpertWeights(*mx.quantize(normal(*shape)))

    weights = SparseWeights(
        packed(_EXPERTS_HELD, 2 * inner, hidden),
        packed(_EXPERTS_HELD, hidden, inner),
        (packed(2 * inner, hidden),),
        packed(hidden, inner),
    )
    unread = [
        sum(x.nbytes for x in matrix[:3] if isinstance(x, mx.array)) * (_EXPERTS_HELD - k) // _EXPERTS_HELD
        for matrix in (weights.gate_up, weights.down)
    ]
    routing = Routing(mx.arange(k, dtype=mx.uint32)[None], mx.ones((1, k)) / k, mx.ones((1, 1)))
    router = launches(lambda: route(normal(1, text.moe.num_experts + 1), k))
    gate_up, down = launches(lambda: sparse_mlp(normal(1, hidden), routing, weights))
    return [moved(*router), moved(gate_up, unread[0]), moved(down, unread[1])]


def prefill_kernels(T: int) -> list[Moved]:
    """Both forms of the prefill kernel and mlx-lm's packed one, on the same inputs: Hk 2, Hv 4, Dk = Dv = 128."""
    inputs = random_inputs(T, Hk=2, Hv=4, Dk=128, Dv=128, dtype=_DTYPE)
    found = []
    for form in ("sequential", "chunked"):
        call = (inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta, inputs.state)
        found.append(moved(*launches(lambda call=call, form=form: gated_delta_prefill(*call, form=form))))
    peer = moved(*launches(lambda: _mlx_lm_prefill(inputs)))
    return [*found, Moved(f"mlx-lm: {peer.kernel}", found[0].minimum, peer.per_launch, peer.per_threadgroup)]


def _mlx_lm_prefill(inputs) -> tuple[mx.array, mx.array]:
    from mlx_lm.models import gated_delta as peer

    available, mx.metal.is_available = mx.metal.is_available, lambda: True
    try:
        peer._gated_delta_kernel_packed = peer._make_gated_delta_packed_kernel()
        q, k = peer.normalize_qk(inputs.q, inputs.k, inv_scale=128**-0.5, eps=1e-6)
        return peer.gated_delta_kernel(q, k, inputs.v, mx.exp(inputs.log_decay), inputs.beta, inputs.state)
    finally:
        mx.metal.is_available = available


def context_kernels(S: int, bits: int | None) -> tuple[Moved, int]:
    """Attention of one token to S others in one key head of 9B, and what is planned for its keys and values."""
    text = released("9B").text
    D, sharing = text.head_dim, text.num_attention_heads // text.num_key_value_heads
    q, kv = normal(1, sharing, 1, D), [normal(1, 1, S, D) for _ in range(2)]
    if bits is None:
        (first, *_) = launches(lambda: attention(q, *kv, scale=D**-0.5))
    else:
        held = [mx.quantize(x, KV_GROUP_SIZE, bits) for x in kv]
        mx.eval(held)
        (first, *_) = launches(lambda: packed_attention(q, *held, bits=bits, group_size=KV_GROUP_SIZE, scale=D**-0.5))
    heads = text.num_key_value_heads * text.layer_types.count("full_attention")
    return moved(first), kv_bytes(text, S, kv_bits=bits) // heads


def contexts_table(contexts: Sequence[int]) -> Table:
    """Bytes that attention to long contexts moves beside what is planned for keys and values."""
    rows = []
    for S in contexts:
        for bits in (None, 8, 4):
            found, planned = context_kernels(S, bits)
            ratios = (f"{count / planned:.3f}" for count in (found.per_launch, found.per_threadgroup))
            rows.append((f"{S:,} tokens, {'bf16' if bits is None else f'{bits} bits'}", f"{planned:,}", *ratios))
    note = "Bytes of one key head of 9B, of its first launch over what is planned for keys and values."
    return Table(
        "Attention of a decoded token", note, ("context", "planned", "once a launch", "once a threadgroup"), rows
    )


def main() -> None:
    """Print the tables."""
    if sys.argv[1:]:
        print(contexts_table([int(tokens) for tokens in sys.argv[1:]]))
        return
    header = ("kernel", "minimum", "once a launch", "once a threadgroup")
    note = "Bytes over the minimum (each input and output once), bf16."
    for size in ("0.8B", "9B", "35B-A3B"):
        rows = [kernel.row for kernel in decode_kernels(released(size).text)]
        print(Table(f"A decoded token of {size}", note, header, rows))
    rows = [(f"{kernel.row[0]}, T = {T}", *kernel.row[1:]) for T in (64, 128) for kernel in prefill_kernels(T)]
    print(Table("Prefill of the gated delta rule", note, header, rows))


if __name__ == "__main__":
    main()
