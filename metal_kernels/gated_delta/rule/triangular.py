"""Inverses of many small unit lower triangular matrices at once."""

from functools import cache

import mlx.core as mx

# Up to that many rows, as a step verifies, LAPACK's substitution on a CPU takes one node in place of twenty.
_FEW = 8


def inverse_of_unit_lower(a: mx.array) -> mx.array:
    """Invert I + L, where L is the part of ``a`` strictly below the diagonal; the rest of ``a`` is not read.

    Block forward substitution: the inverses of two neighbouring diagonal blocks are merged into the inverse of the
    block that spans both, until one block is left. Unlike sums of powers of L this keeps fp32 accuracy for the
    ill-conditioned matrices that repeated keys give.

    Args:
        a: fp32 [..., C, C], any C.

    Returns:
        fp32 [..., C, C].
    """
    C = a.shape[-1]
    if C <= _FEW and mx.default_device() == mx.cpu:
        return mx.linalg.tri_inv(mx.where(_diagonal(C), 1.0, a))
    n = 1 << (C - 1).bit_length()
    blocks = a.reshape(-1, C, C)
    if n != C:
        blocks = mx.pad(blocks, [(0, 0), (0, n - C), (0, n - C)])
    inverse = mx.ones((blocks.shape[0], n, 1, 1))
    size = 1
    while size < n:
        inverse = _merge(inverse, _below_diagonal_blocks(blocks, size))
        size *= 2
    return inverse[:, 0, :C, :C].reshape(a.shape)


@cache
def _diagonal(C: int) -> mx.array:
    return mx.array([[i == j for j in range(C)] for i in range(C)])


def _below_diagonal_blocks(a: mx.array, size: int) -> mx.array:
    """Return, of a [N, n, n], the lower left block of every diagonal block of twice ``size``: [N, n / 2 size, ...]."""
    N, n, _ = a.shape
    return mx.as_strided(a, (N, n // (2 * size), size, size), (n * n, 2 * size * (n + 1), n, 1), size * n)


def _merge(inverse: mx.array, below: mx.array) -> mx.array:
    """Merge pairs of inverted diagonal blocks [N, m, s, s] joined by ``below`` into [N, m / 2, 2 s, 2 s]."""
    first, second = inverse[:, 0::2], inverse[:, 1::2]
    joined = -(second @ below @ first) if below.shape[-1] > 1 else -below
    upper = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([upper, mx.concatenate([joined, second], axis=-1)], axis=-2)
