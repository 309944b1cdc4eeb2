"""The gated delta rule in plain MLX: the definition.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024).
"""

from collections.abc import Callable

import mlx.core as mx

from metal_kernels.gated_delta.rule.chunked import chunked_gated_delta_rule
from metal_kernels.gated_delta.rule.step import gated_delta_step

Rule = Callable[
    [mx.array, mx.array, mx.array, mx.array, mx.array, mx.array | None],
    tuple[mx.array, mx.array],
]


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Reference of :func:`metal_kernels.gated_delta.gated_delta_rule`."""
    rule = gated_delta_step if q.shape[1] == 1 else chunked_gated_delta_rule
    y, state = rule(q, k, v, masked_rows(log_decay, mask), masked_rows(beta, mask), state)
    return y.astype(v.dtype), state


def masked_rows(x: mx.array, mask: mx.array | None) -> mx.array:
    """x [B, T, D], zero where mask bool [B, T] is False."""
    return x if mask is None else mx.where(mask[..., None], x, mx.zeros((), x.dtype))
