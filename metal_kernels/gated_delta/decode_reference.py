"""A few new tokens of a Gated DeltaNet layer, in plain MLX: the definition."""

from typing import NamedTuple

import mlx.core as mx

from metal_kernels.gated_delta import reference
from metal_kernels.gated_delta.chunked import chunked_gated_delta_rule
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
    *,
    conv_weight: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm_weight: mx.array,
    eps: float,
    num_key_heads: int,
    key_head_dim: int,
    num_value_heads: int,
    value_head_dim: int,
    conv_state: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    tape: bool = False,
    rule: reference.Rule = chunked_gated_delta_rule,
) -> DecodeResult:
    """Reference of `metal_kernels.gated_delta.gated_delta_decode`; `rule` runs several tokens without a tape."""
    channels = 2 * num_key_heads * key_head_dim + num_value_heads * value_head_dim
    qkv, z = mx.split(qkvz, [channels], axis=-1)
    b, a = mx.split(x @ ba_weight.T, 2, axis=-1)
    if not tape:
        mixed = reference.gated_delta_mixer(
            qkv,
            z,
            b,
            a,
            conv_weight=conv_weight,
            A_log=A_log,
            dt_bias=dt_bias,
            norm_weight=norm_weight,
            eps=eps,
            num_key_heads=num_key_heads,
            key_head_dim=key_head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_state=conv_state,
            state=state,
            mask=mask,
            rule=rule,
        )
        return DecodeResult(*mixed, None)

    B, T, _ = qkvz.shape
    qkv = masked_rows(qkv, mask)
    before = None if conv_state is None else conv_state.astype(mx.float32)
    mixed_qkv, conv_state = reference.causal_conv(qkv.astype(mx.float32), conv_weight, before)
    log_decay, beta = reference.log_decay_and_beta(a, b, A_log, dt_bias)
    key_dim = num_key_heads * key_head_dim
    q, k, v = mx.split(mixed_qkv, [key_dim, 2 * key_dim], axis=-1)
    log_decay, beta = masked_rows(log_decay, mask), masked_rows(beta, mask)
    y, state, k, delta = taped_gated_delta_rule(
        q.reshape(B, T, num_key_heads, key_head_dim),
        k.reshape(B, T, num_key_heads, key_head_dim),
        v.reshape(B, T, num_value_heads, value_head_dim),
        log_decay,
        beta,
        mx.zeros((B, num_value_heads, value_head_dim, key_head_dim)) if state is None else state,
    )
    y = reference.gated_rms_norm(y, z.reshape(y.shape), norm_weight, eps).reshape(z.shape)
    return DecodeResult(y, conv_state.astype(qkvz.dtype), state, Tape(k, delta, log_decay, qkv))


def masked_rows(x: mx.array, mask: mx.array | None) -> mx.array:
    """x [B, T, D], zero where mask bool [B, T] is False."""
    return x if mask is None else mx.where(mask[..., None], x, mx.zeros((), x.dtype))
