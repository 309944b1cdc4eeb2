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

    def placed(x: mx.array, weight: mx.array) -> mx.array:
        """Norm and rotate [B, T, heads, D] in fp32, rounded once: [B, heads, T, D]."""
        normed = mx.fast.rms_norm(x.astype(mx.float32), weight, eps).transpose(0, 2, 1, 3)
        return rotate(normed, rotary, positions).astype(x.dtype)

    q, k, v, _ = mx.split(qkv, [H * D, (H + Hkv) * D, (H + 2 * Hkv) * D], axis=-1)
    q = placed(q.reshape(B, T, H, D), q_weight)
    k = placed(k.reshape(B, T, Hkv, D), k_weight)
    return q, mx.stack([k, v.reshape(B, T, Hkv, D).transpose(0, 2, 1, 3)])


def attention_epilogue(attended: mx.array, gate: mx.array) -> mx.array:
    """See `metal_kernels.attention.attention_epilogue`."""
    y = attended.transpose(0, 2, 1, 3).reshape(gate.shape)
    return (y * mx.sigmoid(gate.astype(mx.float32))).astype(y.dtype)
