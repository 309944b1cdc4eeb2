"""Norms, rotation and gate around softmax attention, in plain MLX: the definition.

Source: transformers' `Qwen3_5Attention`.
"""

import mlx.core as mx

from metal_kernels.attention.rotary import Rotary, rotate


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
    """See `metal_kernels.attention.attention_prologue`."""
    B, T, _ = qkv.shape
    H, Hkv, D = num_heads, num_kv_heads, q_weight.shape[0]

    def normed(x: mx.array, weight: mx.array) -> mx.array:
        return mx.fast.rms_norm(x.reshape(B, T, -1, D).astype(mx.float32), weight, eps)

    q, k, v, _ = mx.split(qkv, [H * D, (H + Hkv) * D, (H + 2 * Hkv) * D], axis=-1)
    # Angles take more nodes than all the rest: queries and keys are turned as heads of one array, rounded once.
    heads = normed(k, k_weight) if H == 0 else mx.concatenate([normed(q, q_weight), normed(k, k_weight)], axis=2)
    placed = rotate(heads.transpose(0, 2, 1, 3), rotary, positions).astype(qkv.dtype)
    return placed[:, :H], mx.stack([placed[:, H:], v.reshape(B, T, Hkv, D).transpose(0, 2, 1, 3)])


def attention_epilogue(attended: mx.array, gate: mx.array) -> mx.array:
    """See `metal_kernels.attention.attention_epilogue`."""
    y = attended.transpose(0, 2, 1, 3).reshape(gate.shape)
    return (y * mx.sigmoid(gate.astype(mx.float32))).astype(y.dtype)
