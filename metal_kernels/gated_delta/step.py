"""One token: the gated delta rule as a direct step, and the whole mixer around it.

While decoding, building and scheduling the graph can cost more than its arithmetic, so these forms use few nodes: every
head is a row [B, H, 1, D] throughout, and a matrix product with an addend gives a sum of squares plus eps.
"""

import mlx.core as mx

from metal_kernels.gated_delta.layer import Mixer

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
    y, state = _write_and_read(qk, v, mx.exp(log_decay).reshape(B, Hv, 1, 1), beta.reshape(B, Hv, 1, 1), state)
    return (y * Dk**-0.5).reshape(B, 1, Hv, Dv), state


def mix_one_token(
    mixed: mx.array,
    z: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    layer: Mixer,
    state: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Run the rule and the gated norm for one token.

    Args:
        mixed: fp32 [B, 1, 2 Hk Dk + Hv Dv], the convolved rows.
        z: [B, 1, Hv Dv].
        log_decay, beta: fp32 [B, 1, Hv].
        layer: its norm and heads are used.
        state: fp32 [B, Hv, Dv, Dk] or None.

    Returns:
        y [B, 1, Hv Dv] in z's dtype and the new state.
    """
    B, (Hk, Dk, Hv, Dv) = z.shape[0], layer.heads
    qk, v = mx.split(mixed, [2 * Hk * Dk], axis=-1)
    y, state = _write_and_read(
        qk.reshape(B, 2 * Hk, 1, Dk),
        v.reshape(B, Hv, 1, Dv),
        mx.exp(log_decay).reshape(B, Hv, 1, 1),
        beta.reshape(B, Hv, 1, 1),
        state,
    )
    # y lacks the factor Dk^-0.5; the norm takes it out again but for eps, which is scaled to match.
    y = y * _inverse_norm(y, Dk * layer.eps, 1 / Dv) * layer.norm_weight.astype(mx.float32)
    z32 = z.astype(mx.float32)
    return (y.reshape(z.shape) * (z32 * mx.sigmoid(z32))).astype(z.dtype), state


def _write_and_read(
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
    q, k = mx.split(qk * _inverse_norm(qk, NORM_EPS, 1.0), 2, axis=1)
    if state is None:
        delta = v * beta
        state = delta.reshape(B, Hk, rows, 1) * k
    else:
        state = (state * decay).reshape(B, Hk, rows, Dk)
        delta = (v - (k @ state.swapaxes(-1, -2)).reshape(v.shape)) * beta
        state = state + delta.reshape(B, Hk, rows, 1) * k
    return (q @ state.swapaxes(-1, -2)).reshape(v.shape), state.reshape(B, Hv, Dv, Dk)


def _inverse_norm(x: mx.array, eps: float, scale: float) -> mx.array:
    """Return (scale sum(x^2) + eps)^-0.5 of every row of x [B, H, 1, D], [B, H, 1, 1]."""
    return mx.rsqrt(mx.addmm(mx.array(eps), x, x.swapaxes(-1, -2), alpha=scale))
