"""The causal convolution of a Gated DeltaNet layer, in plain MLX."""

import mlx.core as mx

from metal_kernels._fusion import fused_on_metal
from metal_kernels.gated_delta.lanes import join_lanes, run_in_lanes
from metal_kernels.gated_delta.rule.reference import masked_rows

# Windows of so few tokens are taken as one array, in fewer nodes than a sum tap by tap.
_FEW = 8


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
    return rounded_conv(x, weight, conv_state, mask, x.dtype)


def rounded_conv(
    x: mx.array, weight: mx.array, conv_state: mx.array | None, mask: mx.array | None, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Compute :func:`causal_conv` with sums and y rounded to ``dtype``."""
    B, T, C = x.shape
    W = weight.shape[1]
    x = masked_rows(x, mask)
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
    return silu(sums.astype(like.dtype).astype(mx.float32)).astype(like.dtype)


def _sums_over_taps(window: mx.array, taps: mx.array) -> mx.array:
    """Return sum_w window[:, t + w] taps[:, w] for window [B, T + W - 1, C] and taps [1, W, C], as [B, T, C]."""
    W = taps.shape[1]
    T = window.shape[1] - W + 1
    if T == 1:
        return (window * taps).sum(axis=1, keepdims=True)
    if T <= _FEW:
        B, rows, C = window.shape
        windows = mx.as_strided(window, (B, T, W, C), (rows * C, C, C, 1))
        return (windows * taps).sum(axis=2)
    sums = window[:, :T] * taps[:, :1]
    for w in range(1, W):
        sums = sums + window[:, w : w + T] * taps[:, w : w + 1]
    return sums


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)
