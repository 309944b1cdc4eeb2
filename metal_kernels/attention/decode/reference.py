"""Softmax attention of the last tokens of a sequence to all of it, in plain MLX: the definition."""

import mlx.core as mx

Packed = tuple[mx.array, mx.array, mx.array]


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None) -> mx.array:
    """See `metal_kernels.attention.attention`."""
    part: mx.array | str | None = mask
    if mask is None and q.shape[2] > 1:
        part = "causal"
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=part)


def packed_attention(
    q: mx.array, keys: Packed, values: Packed, *, bits: int, group_size: int, scale: float, mask: mx.array | None
) -> mx.array:
    """See `metal_kernels.attention.packed_attention`.

    Queries that share a key head are rows of one matrix, so that keys and values are read once for all of them.
    """
    (B, H, T, D), (_, Hkv, S, _) = q.shape, keys[0].shape

    def multiplied(x: mx.array, packed: Packed, *, transpose: bool) -> mx.array:
        return mx.quantized_matmul(x, *packed, transpose=transpose, group_size=group_size, bits=bits)

    scores = multiplied((q * scale).reshape(B, Hkv, -1, D), keys, transpose=True)
    part = None if mask is None else mask[:, :, None]
    if mask is None and T > 1:
        part = mx.arange(S)[None] <= mx.arange(S - T, S)[:, None]
    if part is not None:
        grouped = scores.reshape(B, Hkv, H // Hkv, T, S)
        scores = mx.where(part, grouped, mx.finfo(scores.dtype).min).reshape(scores.shape)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return multiplied(weights, values, transpose=False).reshape(B, H, T, D)
