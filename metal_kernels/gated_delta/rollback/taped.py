"""The gated delta rule over a few tokens, keeping a record from which any prefix of them can be replayed."""

import mlx.core as mx

from metal_kernels.gated_delta.rollback.reference import replayed
from metal_kernels.gated_delta.rule.chunked import decay_between
from metal_kernels.gated_delta.rule.step import NORM_EPS
from metal_kernels.gated_delta.rule.triangular import inverse_of_unit_lower


def taped_gated_delta_rule(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Run the rule over T tokens as one chunk; work and memory grow with T squared.

    Args:
        q, k: [B, T, Hk, Dk], not normalized.
        v: [B, T, Hv, Dv].
        log_decay, beta: fp32 [B, T, Hv], zero where masked.
        state: fp32 [B, Hv, Dv, Dk].

    Returns:
        y fp32 [B, T, Hv, Dv], the state after the last token, and for a tape the keys of unit length fp32
        [B, T, Hk, Dk] and what every token wrote along them, fp32 [B, T, Hv, Dv].
    """
    B, T, Hk, Dk = q.shape
    Hv, Dv = v.shape[2:]
    q, k = _normalized(q) * Dk**-0.5, _normalized(k)
    queries, keys = q.swapaxes(1, 2)[:, :, None], k.swapaxes(1, 2)[:, :, None]
    values = v.astype(mx.float32).reshape(B, T, Hk, Hv // Hk, Dv).transpose(0, 2, 3, 1, 4)
    log_decays, betas = (x.reshape(B, T, Hk, Hv // Hk).transpose(0, 2, 3, 1) for x in (log_decay, beta))

    between = decay_between(log_decays)
    decay = mx.exp(mx.cumsum(log_decays, axis=-1))[..., None]
    memory = state.reshape(B, Hk, Hv // Hk, Dv, Dk).swapaxes(-1, -2)
    missing = betas[..., None] * (values - (keys * decay) @ memory)
    delta = inverse_of_unit_lower(betas[..., None] * between * (keys @ keys.swapaxes(-1, -2))) @ missing
    y = (queries * decay) @ memory + (between * (queries @ keys.swapaxes(-1, -2))) @ delta
    y, delta = (x.transpose(0, 3, 1, 2, 4).reshape(B, T, Hv, Dv) for x in (y, delta))
    return y, replayed(k, delta, log_decay, state), k, delta


def _normalized(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + NORM_EPS)
