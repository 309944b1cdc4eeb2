"""Launches of `prologue.metal` and `epilogue.metal`."""

from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels.attention.rotary import Rotary

_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
_WIDEST_HEAD = 512
_LANES = 32
_HEADS_TOGETHER = 16
_COLUMNS_PER_THREAD = 4
_PROLOGUE = MetalKernel(
    file=Path(__file__).with_name("prologue.metal"),
    function="mlx_qwen::attention_prologue",
    inputs=("qkv", "q_weight", "k_weight", "frequencies", "axes", "positions", "eps"),
    outputs=("q", "kv"),
    template=("T", "H", "HKV", "D", "DIMS", "ADVANCING"),
    arguments=(
        *("qkv", "qkv_shape", "qkv_strides", "q_weight", "q_weight_strides", "k_weight", "k_weight_strides"),
        *("frequencies", "axes", "positions", "positions_strides", "eps", "q", "kv", "thread_position_in_grid"),
    ),
    row_contiguous=False,
)
_EPILOGUE = MetalKernel(
    file=Path(__file__).with_name("epilogue.metal"),
    function="mlx_qwen::attention_epilogue",
    inputs=("attended", "gate"),
    outputs=("gated",),
    template=("T", "D"),
    arguments=(
        *("attended", "attended_shape", "attended_strides", "gate", "gate_strides", "gated"),
        *("thread_position_in_grid", "threads_per_grid"),
    ),
    row_contiguous=False,
)


def prologue_unsupported(qkv: mx.array, q_weight: mx.array, k_weight: mx.array, num_heads: int) -> str | None:
    """Why the prologue's kernel does not take these inputs, or None when it does."""
    if num_heads == 0:
        return "no queries"
    if qkv.dtype not in _DTYPES or q_weight.dtype != mx.float32 or k_weight.dtype != mx.float32:
        return "dtype"
    # MLX passes arrays of fewer than 8 elements in another address space.
    if not 8 <= q_weight.size <= _WIDEST_HEAD:
        return f"heads are not 8 to {_WIDEST_HEAD} wide"
    return "empty input" if qkv.size == 0 else None


def epilogue_unsupported(attended: mx.array, gate: mx.array) -> str | None:
    """Why the epilogue's kernel does not take these inputs, or None when it does."""
    if attended.dtype not in _DTYPES or gate.dtype != attended.dtype:
        return "dtype"
    return "fewer than 8 elements" if attended.size < 8 else None


def attention_prologue(
    qkv: mx.array,
    q_weight: mx.array,
    k_weight: mx.array,
    positions: mx.array,
    *,
    rotary: Rotary,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[mx.array, mx.array]:
    """See `metal_kernels.attention.attention_prologue`; inputs as `prologue_unsupported` allows."""
    B, T, _ = qkv.shape
    H, Hkv, D = num_heads, num_kv_heads, q_weight.size
    advancing = positions.ndim < 3
    if advancing:
        positions = mx.broadcast_to(positions.reshape(1, -1, 1), (3, B, T))
    heads = H + 2 * Hkv
    q, kv = _PROLOGUE(
        [qkv, q_weight, k_weight, rotary.frequencies, rotary.axes, positions, mx.array(eps)],
        [qkv.dtype, H, Hkv, D, rotary.dims, advancing],
        grid=(_LANES, heads, B * T),
        # Several heads of a token together, so that weights and frequencies are read once for them.
        threadgroup=(_LANES, min(heads, _HEADS_TOGETHER), 1),
        output_shapes=[(B, H, T, D), (2, B, Hkv, T, D)],
        output_dtypes=[qkv.dtype, qkv.dtype],
    )
    return q, kv


def attention_epilogue(attended: mx.array, gate: mx.array) -> mx.array:
    """See `metal_kernels.attention.attention_epilogue`; inputs as `epilogue_unsupported` allows."""
    B, T, width = gate.shape
    columns = -(-width // _COLUMNS_PER_THREAD)
    return _EPILOGUE(
        [attended, gate],
        [attended.dtype, attended.shape[-1]],
        grid=(columns, T, B),
        threadgroup=(min(columns, 256), 1, 1),
        output_shapes=[gate.shape],
        output_dtypes=[attended.dtype],
    )[0]
