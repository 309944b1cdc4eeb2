"""The gated delta rule over a few tokens, keeping a record from which any prefix of them can be replayed.

While drafts are verified, building and scheduling the graph can cost more than its arithmetic: so queries and keys go
through the same few nodes, and all sums of decays come from one product.
"""

import math
from functools import cache

import mlx.core as mx

from metal_kernels.gated_delta.rule.step import NORM_EPS
from metal_kernels.gated_delta.rule.triangular import inverse_of_unit_lower


def taped_gated_delta_rule(
    qk: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Run the rule over T tokens as one chunk; work and memory grow with T squared.

    Args:
        qk: [B, T, 2, Hk, Dk], queries and keys, not normalized.
        v: [B, T, Hv, Dv].
        log_decay, beta: fp32 [B, T, Hv], zero where masked; log_decay is finite.
        state: fp32 [B, Hv, Dv, Dk].

    Returns:
        y fp32 [B, T, Hv, Dv], the state after the last token, and for a tape the keys of unit length fp32
        [B, T, Hk, Dk] and what every token wrote along them, fp32 [B, T, Hv, Dv].
    """
    B, T, _, Hk, Dk = qk.shape
    Hv, Dv = v.shape[2:]
    groups = (B, Hk, Hv // Hk)
    qk = qk.astype(mx.float32)
    qk = qk * mx.rsqrt(mx.square(qk).sum(axis=-1, keepdims=True) + NORM_EPS) * _scales(Dk)
    rows = qk.transpose(0, 3, 2, 1, 4).reshape(B, Hk, 1, 2 * T, Dk)
    keys = rows[..., T:, :]
    queries_keys, keys_keys = mx.split(rows @ keys.swapaxes(-1, -2), 2, axis=-2)
    values = v.astype(mx.float32).reshape(B, T, *groups[1:], Dv).transpose(0, 2, 3, 1, 4)
    beta = beta.swapaxes(1, 2).reshape(*groups, T, 1)

    decays = _decays(log_decay).reshape(*groups, T, T + 1)
    decay, between = mx.split(decays, [1], axis=-1)
    before = state.reshape(*groups, Dv, Dk)
    read, foreseen = mx.split(rows @ before.swapaxes(-1, -2), 2, axis=-2)
    delta = inverse_of_unit_lower(beta * between * keys_keys) @ (beta * (values - decay * foreseen))
    y = decay * read + (between * queries_keys) @ delta

    all_decay, decay_after = mx.split(decays[..., -1:, :], [1], axis=-1)
    after = mx.addmm(before * all_decay, delta.swapaxes(-1, -2) * decay_after, keys)
    y, delta = (x.transpose(0, 3, 1, 2, 4).reshape(B, T, Hv, Dv) for x in (y, delta))
    return y, after.reshape(state.shape), qk[:, :, 1], delta


def _decays(log_decay: mx.array) -> mx.array:
    """What is left at token i of what there was before the first token, and behind each token j: [B, Hv, T (T + 1)].

    The sums are formed directly, from log_decay [B, T, Hv]: a difference of two running sums would cancel when decay is
    strong. Behind tokens that are still to come nothing is left.
    """
    summed, future = _sums(log_decay.shape[1])
    return mx.exp(log_decay.swapaxes(1, 2) @ summed + future)


@cache
def _sums(T: int) -> tuple[mx.array, mx.array]:
    """Which tokens' decays lie between places, [1, T, T (T + 1)], and -inf where there is no between, [T (T + 1)]."""
    places = [(i, place) for i in range(T) for place in range(T + 1)]
    between = mx.array([[[float(place <= t <= i) for i, place in places] for t in range(T)]])
    return between, mx.array([-math.inf if place > i + 1 else 0.0 for i, place in places])


@cache
def _scales(Dk: int) -> mx.array:
    """What queries and keys of unit length are multiplied by, [2, 1, 1]."""
    return mx.array([[[Dk**-0.5]], [[1.0]]])
