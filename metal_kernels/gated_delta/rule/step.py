"""One token: the gated delta rule as a direct step.

While decoding, building and scheduling the graph can cost more than its arithmetic, so these forms use few nodes: every
head is a row [B, H, 1, D] throughout, and a matrix product with an addend gives a sum of squares plus eps.
"""

import mlx.core as mx

NORM_EPS = 1e-6


def gated_delta_step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Decay the state, write one token to it and read it; arguments and results as the chunked form's with T = 1."""
    B, _, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    qk = mx.concatenate([q, k], axis=2).astype(mx.float32).reshape(B, 2 * Hk, 1, Dk)
    v = v.astype(mx.float32).reshape(B, Hv, 1, Dv)
    y, state = write_and_read(qk, v, mx.exp(log_decay).reshape(B, Hv, 1, 1), beta.reshape(B, Hv, 1, 1), state)
    return (y * Dk**-0.5).reshape(B, 1, Hv, Dv), state


def write_and_read(
    qk: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Step the state by one token.

    Args:
        qk: all queries, then all keys, not normalized, fp32 [B, 2 Hk, 1, Dk].
        v: fp32 [B, Hv, 1, Dv].
        decay, beta: fp32 [B, Hv, 1, 1].
        state: fp32 [B, Hv, Dv, Dk] or None.

    Returns:
        y fp32 [B, Hv, 1, Dv] for queries of length 1, without the factor Dk^-0.5, and the new state.
    """
    B, Hv, _, Dv = v.shape
    Hk, Dk = qk.shape[1] // 2, qk.shape[3]
    rows = Hv // Hk * Dv
    q, k = mx.split(qk * inverse_norm(qk, NORM_EPS, 1.0), 2, axis=1)
    if state is None:
        delta = v * beta
        state = delta.reshape(B, Hk, rows, 1) * k
    else:
        state = (state * decay).reshape(B, Hk, rows, Dk)
        delta = (v - (k @ state.swapaxes(-1, -2)).reshape(v.shape)) * beta
        state = state + delta.reshape(B, Hk, rows, 1) * k
    return (q @ state.swapaxes(-1, -2)).reshape(v.shape), state.reshape(B, Hv, Dv, Dk)


def inverse_norm(x: mx.array, eps: float, scale: float) -> mx.array:
    """Return (scale sum(x^2) + eps)^-0.5 of every row of x [B, H, 1, D], [B, H, 1, 1]."""
    return mx.rsqrt(mx.addmm(mx.array(eps), x, x.swapaxes(-1, -2), alpha=scale))
