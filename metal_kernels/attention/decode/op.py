"""What a model calls for softmax attention, with the choice between kernel and reference."""

from collections.abc import Sequence

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.attention.decode import kernel, reference
from metal_kernels.attention.decode.reference import Packed


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Softmax attention of the last T tokens of S: each sees the tokens up to itself, or what `mask` says.

    The kernel takes 1 to 8 tokens and heads of 32 to 256 in steps of 32. It reads keys and values once for up to 32
    query rows that share a key head, at any strides between rows whose own elements lie beside each other. Contexts of
    more than 256 tokens may be split over threadgroups, whose results a second launch adds up. Sums are fp32; fp32
    results differ from the exact ones by at most 2e-6 of the largest value.

    Args:
        q: [B, H, T, D].
        k, v: [B, Hkv, S, D] of the same dtype; query head h reads key head h // (H / Hkv).
        scale: what scores are multiplied with.
        mask: bool [B, 1, T, S], with at least one True for each token; None for a causal one.

    Returns:
        [B, H, T, D] in the same dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    _check_shapes(q, k.shape[1], k.shape[2], mask)
    if takes_kernel("attention", kernel.unsupported(q, k.dtype, k.shape[2], mask)):
        return kernel.attention(q, k, v, scale=scale, mask=mask)
    return reference.attention(q, k, v, scale=scale, mask=mask)


def attention_of_rows(q: mx.array, rows: Sequence[tuple[mx.array, mx.array]], *, scale: float) -> mx.array:
    """As causal `attention`, where each sequence of a batch has keys and values of its own, of any length.

    Args:
        q: [B, H, T, D].
        rows: B times keys and values, each [1, Hkv, S, D] with an S of its own.
    """
    for k, _ in rows:
        _check_shapes(q, k.shape[1], k.shape[2], None)
    because = kernel.unsupported(q, rows[0][0].dtype, rows[0][0].shape[2], None)
    if reference.takes_few_nodes(q) and not takes_kernel("attention", because):
        return reference.attention_of_rows(q, rows, scale=scale)
    parts = zip(reference.parted(q, len(rows)), rows, strict=True)
    return mx.concatenate([attention(part, *row, scale=scale) for part, row in parts])


def packed_attention(
    q: mx.array,
    keys: Packed,
    values: Packed,
    *,
    bits: int,
    group_size: int,
    scale: float,
    mask: mx.array | None = None,
) -> mx.array:
    """As `attention`, of keys and values packed by `mx.quantize`, which are never unpacked in memory.

    Args:
        keys, values: codes uint32 [B, Hkv, S, D bits / 32], scales and biases [B, Hkv, S, D / group_size] in q's dtype.
        bits: 4 or 8.
        group_size: 32, 64 or 128 channels.
    """
    words, scales, _ = keys
    _check_shapes(q, words.shape[1], words.shape[2], mask)
    because = kernel.unsupported(q, scales.dtype, words.shape[2], mask)
    if takes_kernel("packed_attention", because):
        return kernel.packed_attention(q, keys, values, bits=bits, group_size=group_size, scale=scale, mask=mask)
    return reference.packed_attention(q, keys, values, bits=bits, group_size=group_size, scale=scale, mask=mask)


def _check_shapes(q: mx.array, heads: int, keys: int, mask: mx.array | None) -> None:
    B, H, T, _ = q.shape
    if H % heads:
        raise ValueError(f"attention: {H} query heads cannot share {heads} key heads evenly")
    if mask is not None and mask.shape != (B, 1, T, keys):
        raise ValueError(f"attention: mask is {mask.shape}, expected {(B, 1, T, keys)} for queries {q.shape}")
