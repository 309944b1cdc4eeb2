"""One token through the rule and the norm of a Gated DeltaNet layer, in as few nodes as its step."""

import mlx.core as mx

from metal_kernels.gated_delta.layer import Mixer
from metal_kernels.gated_delta.rule.step import inverse_norm, write_and_read


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
        log_decay: fp32 [B, Hv].
        beta: fp32 [B, Hk, Hv / Hk, 1, 1].
        layer: its norm and heads are used.
        state: fp32 [B, Hv, Dv, Dk] or None.

    Returns:
        y [B, 1, Hv Dv] in z's dtype and the new state.
    """
    B, (Hk, Dk, Hv, Dv) = z.shape[0], layer.heads
    qk, v = mx.split(mixed, [2 * Hk * Dk], axis=-1)
    groups = (B, Hk, Hv // Hk)
    y, state = write_and_read(
        qk.reshape(B, 2 * Hk, 1, 1, Dk),
        v.reshape(*groups, 1, Dv),
        mx.exp(log_decay).reshape(*groups, 1, 1),
        beta,
        state,
    )
    # y lacks the factor Dk^-0.5; the norm takes it out again but for eps, which is scaled to match.
    y = y * inverse_norm(y, Dk * layer.eps, 1 / Dv) * layer.norm_weight.astype(mx.float32)
    z32 = z.astype(mx.float32)
    return (y.reshape(z.shape) * (z32 * mx.sigmoid(z32))).astype(z.dtype), state
