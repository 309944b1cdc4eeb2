"""A few new tokens of a Gated DeltaNet layer, in plain MLX: the definition."""

from typing import NamedTuple

import mlx.core as mx

from metal_kernels.gated_delta import reference
from metal_kernels.gated_delta.chunked import chunked_gated_delta_rule
from metal_kernels.gated_delta.layer import Mixer
from metal_kernels.gated_delta.rollback_reference import Tape
from metal_kernels.gated_delta.taped import taped_gated_delta_rule


class DecodeResult(NamedTuple):
    """What `metal_kernels.gated_delta.gated_delta_decode` returns."""

    y: mx.array
    conv_state: mx.array
    state: mx.array
    tape: Tape | None


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
    rule: reference.Rule = chunked_gated_delta_rule,
) -> DecodeResult:
    """Reference of `metal_kernels.gated_delta.gated_delta_decode`; `rule` runs several tokens without a tape."""
    Hk, Dk, Hv, Dv = layer.heads
    qkv, z = mx.split(qkvz, [layer.heads.channels], axis=-1)
    b, a = mx.split(x @ ba_weight.T, 2, axis=-1)
    if not tape:
        mixed = reference.gated_delta_mixer(
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
    mixed_qkv, conv_state = reference.causal_conv(qkv.astype(mx.float32), layer.conv_weight, before)
    log_decay, beta = reference.log_decay_and_beta(a, b, layer.A_log, layer.dt_bias)
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
    y = reference.gated_rms_norm(y, z.reshape(y.shape), layer.norm_weight, layer.eps).reshape(z.shape)
    return DecodeResult(y, conv_state.astype(qkvz.dtype), state, Tape(k, delta, log_decay, qkv))


def masked_rows(x: mx.array, mask: mx.array | None) -> mx.array:
    """x [B, T, D], zero where mask bool [B, T] is False."""
    return x if mask is None else mx.where(mask[..., None], x, mx.zeros((), x.dtype))
