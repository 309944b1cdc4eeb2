"""What surrounds the gated delta rule in a Gated DeltaNet layer, and all of it together, in plain MLX: the definition.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), and the Qwen3.5
model of transformers.
"""

from typing import NamedTuple

import mlx.core as mx

from metal_kernels._fusion import fused_on_metal
from metal_kernels.gated_delta.lanes import join_lanes, run_in_lanes
from metal_kernels.gated_delta.layer import Mixer
from metal_kernels.gated_delta.mixer.convolution import rounded_conv, silu
from metal_kernels.gated_delta.mixer.one_token import mix_one_token
from metal_kernels.gated_delta.rollback.reference import Tape
from metal_kernels.gated_delta.rollback.taped import taped_gated_delta_rule
from metal_kernels.gated_delta.rule.chunked import chunked_gated_delta_rule
from metal_kernels.gated_delta.rule.reference import Rule, masked_rows


class MixerResult(NamedTuple):
    """What `metal_kernels.gated_delta.gated_delta_mixer` returns."""

    y: mx.array
    conv_state: mx.array
    state: mx.array
    tape: Tape | None


@fused_on_metal
def log_decay_and_beta(a: mx.array, b: mx.array, A_log: mx.array, dt_bias: mx.array) -> tuple[mx.array, mx.array]:
    """Return the log of the state's decay and the writing strength of every token.

    log_decay = -exp(A_log) softplus(a + dt_bias), at most 0; beta = sigmoid(b). Both are kept in fp32: a decay
    rounded to bf16 is off by up to 16 % after the tokens that a slow head remembers.

    Args:
        a, b: [B, T, Hv], any float dtype; b may have any other shape.
        A_log, dt_bias: [Hv].

    Returns:
        log_decay and beta, fp32 [B, T, Hv] as a and b.
    """
    dt = mx.logaddexp(a.astype(mx.float32) + dt_bias.astype(mx.float32), 0.0)
    return -mx.exp(A_log.astype(mx.float32)) * dt, mx.sigmoid(b.astype(mx.float32))


@fused_on_metal
def gated_rms_norm(x: mx.array, z: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Return RMSNorm(x) weight SiLU(z), all in fp32 and rounded once to z's dtype.

    transformers rounds the normalized x to bf16 before the weight; a single rounding is closer to the fp32 result.

    Args:
        x, z: [..., Dv].
        weight: [Dv], the factor itself (not zero-centred).
        eps: added to the mean of squares.
    """
    x32, z32 = x.astype(mx.float32), z.astype(mx.float32)
    inverse_rms = mx.rsqrt(mx.square(x32).mean(axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * weight.astype(mx.float32) * silu(z32)).astype(z.dtype)


def gated_delta_mixer(
    qkvz: mx.array,
    x: mx.array,
    ba_weight: mx.array,
    layer: Mixer,
    *,
    conv_state: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    tape: bool = False,
    rule: Rule = chunked_gated_delta_rule,
) -> MixerResult:
    """Reference of `metal_kernels.gated_delta.gated_delta_mixer`; `rule` runs several tokens without a tape."""
    (B, T, _), (Hk, Dk, Hv, Dv) = qkvz.shape, layer.heads
    qkv, z = mx.split(qkvz, [layer.heads.channels], axis=-1)
    mixed, conv_state = rounded_conv(qkv, layer.conv_weight, conv_state, mask, mx.float32)
    if T == 1 and mask is None and not tape:
        b, a = mx.split(x.reshape(B, -1) @ ba_weight.T, 2, axis=-1)
        gates = log_decay_and_beta(a, b.reshape(B, Hk, Hv // Hk, 1, 1), layer.A_log, layer.dt_bias)
        y, state = mix_one_token(mixed, z, *gates, layer, state)
        return MixerResult(y, conv_state, state, None)

    b, a = mx.split(x @ ba_weight.T, 2, axis=-1)
    gates = log_decay_and_beta(a, b, layer.A_log, layer.dt_bias)
    log_decay, beta = (masked_rows(gate, mask) for gate in gates)
    qk, v = mx.split(mixed, [2 * Hk * Dk], axis=-1)
    qk, v, z = qk.reshape(B, T, 2, Hk, Dk), v.reshape(B, T, Hv, Dv), z.reshape(B, T, Hv, Dv)
    recorded: Tape | None = None
    if tape:
        before = mx.zeros((B, Hv, Dv, Dk)) if state is None else state
        y, state, keys, delta = taped_gated_delta_rule(qk, v, log_decay, beta, before)
        recorded = Tape(keys, delta, log_decay, masked_rows(qkv, mask))
    else:
        y, state = rule(qk[:, :, 0], qk[:, :, 1], v, log_decay, beta, state)

    def normed(first: int, last: int) -> mx.array:
        return gated_rms_norm(y[:, :, first:last], z[:, :, first:last], layer.norm_weight, layer.eps)

    y = join_lanes(run_in_lanes(normed, Hv, T), axis=2).reshape(B, T, Hv * Dv)
    return MixerResult(y, conv_state, state, recorded)
