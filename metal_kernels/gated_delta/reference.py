"""The gated delta rule and what surrounds it in a Gated DeltaNet layer, in plain MLX: the definition.

Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule" (2024), and the Qwen3.5
model of transformers.
"""

from collections.abc import Callable

import mlx.core as mx

from metal_kernels._fusion import fused_on_metal
from metal_kernels.gated_delta.chunked import chunked_gated_delta_rule
from metal_kernels.gated_delta.lanes import join_lanes, run_in_lanes
from metal_kernels.gated_delta.layer import Mixer
from metal_kernels.gated_delta.step import gated_delta_step, mix_one_token

Rule = Callable[
    [mx.array, mx.array, mx.array, mx.array, mx.array, mx.array | None],
    tuple[mx.array, mx.array],
]


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


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Reference of :func:`metal_kernels.gated_delta.gated_delta_rule`."""
    if mask is not None:
        log_decay, beta = _masked(log_decay, mask), _masked(beta, mask)
    rule = gated_delta_step if q.shape[1] == 1 else chunked_gated_delta_rule
    y, state = rule(q, k, v, log_decay, beta, state)
    return y.astype(v.dtype), state


def _masked(gate: mx.array, mask: mx.array) -> mx.array:
    """Return log_decay or beta [B, T, Hv] with 0 for the tokens that mask [B, T] leaves out."""
    return mx.where(mask[..., None], gate, 0.0)


def causal_conv(
    x: mx.array, weight: mx.array, conv_state: mx.array | None = None, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Apply a causal depthwise convolution over tokens, then SiLU.

    Sums are fp32; they are rounded to x's dtype before SiLU (computed in fp32) and after it.

    Args:
        x: [B, T, C].
        weight: [C, W, 1], one filter of W taps a channel, the last tap for the token itself.
        conv_state: the W - 1 inputs before x, [B, W - 1, C]; None is zeros.
        mask: bool [B, T]; inputs where it is False count as zero.

    Returns:
        y [B, T, C] in x's dtype, and the last W - 1 inputs [B, W - 1, C].
    """
    return _rounded_conv(x, weight, conv_state, mask, x.dtype)


def _rounded_conv(
    x: mx.array, weight: mx.array, conv_state: mx.array | None, mask: mx.array | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Compute :func:`causal_conv` with sums and y rounded to ``dtype``."""
    B, T, C = x.shape
    W = weight.shape[1]
    if mask is not None:
        x = mx.where(mask[..., None], x, mx.zeros((), x.dtype))
    if conv_state is None:
        conv_state = mx.zeros((B, W - 1, C), x.dtype)
    window = mx.concatenate([conv_state, x], axis=1)
    taps = weight.astype(mx.float32).transpose(2, 1, 0)
    like = mx.zeros((), dtype)

    def activated(first: int, last: int) -> mx.array:
        return _activated_conv(window[..., first:last], taps[..., first:last], like)

    if T == 1:
        return activated(0, C), window[:, 1:]
    # A copy: a view of the last rows would keep the whole window in memory.
    return join_lanes(run_in_lanes(activated, C, T), axis=-1), mx.contiguous(window[:, T:])


@fused_on_metal
def _activated_conv(window: mx.array, taps: mx.array, like: mx.array) -> mx.array:
    """SiLU of the sums over taps, both rounded to the dtype of `like`."""
    sums = _sums_over_taps(window.astype(mx.float32), taps)
    return _silu(sums.astype(like.dtype).astype(mx.float32)).astype(like.dtype)


def _sums_over_taps(window: mx.array, taps: mx.array) -> mx.array:
    """Return sum_w window[:, t + w] taps[:, w] for window [B, T + W - 1, C] and taps [1, W, C], as [B, T, C]."""
    W = taps.shape[1]
    T = window.shape[1] - W + 1
    if T == 1:
        return (window * taps).sum(axis=1, keepdims=True)
    sums = window[:, :T] * taps[:, :1]
    for w in range(1, W):
        sums = sums + window[:, w : w + T] * taps[:, w : w + 1]
    return sums


def _silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


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
    return (x32 * inverse_rms * weight.astype(mx.float32) * _silu(z32)).astype(z.dtype)


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
    mixed, conv_state = _rounded_conv(qkv, layer.conv_weight, conv_state, mask, mx.float32)
    log_decay, beta = log_decay_and_beta(a, b, layer.A_log, layer.dt_bias)
    if mask is not None:
        log_decay, beta = _masked(log_decay, mask), _masked(beta, mask)
    if T == 1:
        y, state = mix_one_token(mixed, z, log_decay, beta, layer, state)
        return y, conv_state, state
    q, k, v = mx.split(mixed, [Hk * Dk, 2 * Hk * Dk], axis=-1)
    q, k, v, z = (x.reshape(B, T, x.shape[-1] // D, D) for x, D in ((q, Dk), (k, Dk), (v, Dv), (z, Dv)))
    y, state = rule(q, k, v, log_decay, beta, state)

    def normed(first: int, last: int) -> mx.array:
        return gated_rms_norm(y[:, :, first:last], z[:, :, first:last], layer.norm_weight, layer.eps)

    return join_lanes(run_in_lanes(normed, Hv, T), axis=2).reshape(B, T, Hv * Dv), conv_state, state
