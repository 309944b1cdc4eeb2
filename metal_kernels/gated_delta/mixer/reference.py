"""What surrounds the gated delta rule in a Gated DeltaNet layer, and all of it together, in plain MLX: the definition.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), and the Qwen3.5
model of transformers.
"""

from typing import NamedTuple

import mlx.core as mx

from metal_kernels._fusion import fused_on_metal
from metal_kernels.gated_delta.lanes import join_lanes, run_in_lanes
from metal_kernels.gated_delta.layer import Mixer
from metal_kernels.gated_delta.mixer.convolution import causal_conv, rounded_conv, silu
from metal_kernels.gated_delta.mixer.one_token import mix_one_token
from metal_kernels.gated_delta.rollback.reference import Tape
from metal_kernels.gated_delta.rollback.taped import taped_gated_delta_rule
from metal_kernels.gated_delta.rule.chunked import chunked_gated_delta_rule
from metal_kernels.gated_delta.rule.reference import Rule, masked_rows


class DecodeResult(NamedTuple):
    """What `metal_kernels.gated_delta.gated_delta_decode` returns."""

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
        a, b: [B, T, Hv], any float dtype.
        A_log, dt_bias: [Hv].

    Returns:
        log_decay and beta, fp32 [B, T, Hv].
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
    qkv: mx.array,
    z: mx.array,
    b: mx.array,
    a: mx.array,
    layer: Mixer,
    *,
    conv_state: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    rule: Rule = chunked_gated_delta_rule,
) -> tuple[mx.array, mx.array, mx.array]:
    """Reference of :func:`metal_kernels.gated_delta.gated_delta_mixer`.

    All between qkv and y is fp32, whatever the inputs are: nothing is rounded until y. `rule` runs the gated delta
    rule over several tokens.
    """
    B, T, _ = qkv.shape
    Hk, Dk, Hv, Dv = layer.heads
    mixed, conv_state = rounded_conv(qkv, layer.conv_weight, conv_state, mask, mx.float32)
    log_decay, beta = log_decay_and_beta(a, b, layer.A_log, layer.dt_bias)
    log_decay, beta = masked_rows(log_decay, mask), masked_rows(beta, mask)
    if T == 1:
        y, state = mix_one_token(mixed, z, log_decay, beta, layer, state)
        return y, conv_state, state
    q, k, v = mx.split(mixed, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q, k, v, z = (x.reshape(B, T, x.shape[-1] // D, D) for x, D in ((q, Dk), (k, Dk), (v, Dv), (z, Dv)))
    y, state = rule(q, k, v, log_decay, beta, state)

    def normed(first: int, last: int) -> mx.array:
        return gated_rms_norm(y[:, :, first:last], z[:, :, first:last], layer.norm_weight, layer.eps)

    return join_lanes(run_in_lanes(normed, Hv, T), axis=2).reshape(B, T, Hv * Dv), conv_state, state


def gated_delta_decode(
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
) -> DecodeResult:
    """Reference of `metal_kernels.gated_delta.gated_delta_decode`; `rule` runs several tokens without a tape."""
    Hk, Dk, Hv, Dv = layer.heads
    qkv, z = mx.split(qkvz, [layer.heads.channels], axis=-1)
    b, a = mx.split(x @ ba_weight.T, 2, axis=-1)
    if not tape:
        mixed = gated_delta_mixer(
            qkv,
            z,
            b,
            a,
            layer,
            conv_state=conv_state,
            state=state,
            mask=mask,
            rule=rule,
        )
        return DecodeResult(*mixed, None)

    B, T, _ = qkvz.shape
    qkv = masked_rows(qkv, mask)
    before = None if conv_state is None else conv_state.astype(mx.float32)
    mixed_qkv, conv_state = causal_conv(qkv.astype(mx.float32), layer.conv_weight, before)
    log_decay, beta = log_decay_and_beta(a, b, layer.A_log, layer.dt_bias)
    q, k, v = mx.split(mixed_qkv, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    log_decay, beta = masked_rows(log_decay, mask), masked_rows(beta, mask)
    y, state, k, delta = taped_gated_delta_rule(
        q.reshape(B, T, Hk, Dk),
        k.reshape(B, T, Hk, Dk),
        v.reshape(B, T, Hv, Dv),
        log_decay,
        beta,
        mx.zeros((B, Hv, Dv, Dk)) if state is None else state,
    )
    y = gated_rms_norm(y, z.reshape(y.shape), layer.norm_weight, layer.eps).reshape(z.shape)
    return DecodeResult(y, conv_state.astype(qkvz.dtype), state, Tape(k, delta, log_decay, qkv))
