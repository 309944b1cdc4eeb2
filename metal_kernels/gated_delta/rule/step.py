"""One token: the gated delta rule as a direct step.

While decoding, building and scheduling the graph can cost more than its arithmetic, so these forms use few nodes: every
head is a row [..., 1, D] throughout, and a matrix product with an addend gives a sum of squares plus eps.
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
    qk = mx.concatenate([q, k], axis=2).astype(mx.float32).reshape(B, 2 * Hk, 1, 1, Dk)
    groups = (B, Hk, Hv // Hk)
    v = v.astype(mx.float32).reshape(*groups, 1, Dv)
    y, state = write_and_read(qk, v, mx.exp(log_decay).reshape(*groups, 1, 1), beta.reshape(*groups, 1, 1), state)
    return (y * Dk**-0.5).reshape(B, 1, Hv, Dv), state


def write_and_read(
    qk: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Step the state by one token; g = Hv / Hk value heads share a key.

    Args:
        qk: all queries, then all keys, not normalized, fp32 [B, 2 Hk, 1, 1, Dk].
        v: fp32 [B, Hk, g, 1, Dv].
        decay, beta: fp32 [B, Hk, g, 1, 1].
        state: fp32 [B, Hv, Dv, Dk] or None.

    Returns:
        y fp32 [B, Hv, 1, Dv] for queries of length 1, without the factor Dk^-0.5, and the new state.
    """
    (B, Hk, g, _, Dv), Dk = v.shape, qk.shape[-1]
    q, k = mx.split(qk * inverse_norm(qk, NORM_EPS, 1.0), 2, axis=1)

    def read(row: mx.array, state: mx.array) -> mx.array:
        return row @ state.reshape(B, Hk, 1, g * Dv, Dk).swapaxes(-1, -2)

    foreseen = 0.0 if state is None else decay * read(k, state).reshape(v.shape)
    # The view keeps what a token writes out of the loop over the state, which is gone through once.
    written = ((v - foreseen) * beta).swapaxes(-1, -2) * k
    if state is not None:
        written = state.reshape(B, Hk, g, Dv, Dk) * decay + written
    return read(q, written).reshape(B, Hk * g, 1, Dv), written.reshape(B, Hk * g, Dv, Dk)


def inverse_norm(x: mx.array, eps: float, scale: float) -> mx.array:
    """Return (scale sum(x^2) + eps)^-0.5 of every row of x [B, H, 1, D], [B, H, 1, 1]."""
    return mx.rsqrt(mx.addmm(mx.array(eps), x, x.swapaxes(-1, -2), alpha=scale))
