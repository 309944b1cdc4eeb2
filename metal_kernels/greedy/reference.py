"""The best token of logits and the best few, in plain MLX: the definition."""

from typing import NamedTuple

import mlx.core as mx


class Best(NamedTuple):
    """Tokens uint32 [n], their log-probabilities fp32 [n], and log(sum(exp(logits))) fp32 [n, 1]."""

    tokens: mx.array
    logprobs: mx.array
    total: mx.array


def best_tokens(logits: mx.array) -> Best:
    """See `metal_kernels.greedy.best_tokens`."""
    scores = logits.astype(mx.float32)
    total, tokens = mx.logsumexp(scores, axis=-1, keepdims=True), mx.argmax(scores, axis=-1)
    return Best(tokens, (mx.take_along_axis(scores, tokens[:, None], axis=-1) - total)[:, 0], total)


class Top(NamedTuple):
    """The k likeliest tokens uint32 [n, k], likeliest first, their logits fp32 [n, k], and the whole row's total."""

    tokens: mx.array
    scores: mx.array
    total: mx.array


def top_tokens(logits: mx.array, k: int) -> Top:
    """See `metal_kernels.greedy.top_tokens`."""
    scores = logits.astype(mx.float32)
    # On a GPU a partition is a whole sort as well; both sorts are stable.
    if k == scores.shape[-1] or mx.default_device().type == mx.DeviceType.gpu:
        tokens = mx.argsort(-scores, axis=-1)[:, :k]
    else:
        tokens = _partitioned(scores, k)
    return Top(tokens, mx.take_along_axis(scores, tokens, axis=-1), mx.logsumexp(scores, axis=-1, keepdims=True))


def _partitioned(scores: mx.array, k: int) -> mx.array:
    """The tokens by integers of which no two are equal: the order of the score above, the id below."""
    # Adding 0 makes one of both zeros.
    bits = (scores + 0.0).view(mx.uint32)
    falling = mx.where(bits >> 31, bits, bits ^ 0x7FFFFFFF)
    falling = mx.where(mx.isnan(scores), 0xFFFFFFFF, falling).astype(mx.uint64)
    keys = (falling << 32) | mx.arange(scores.shape[-1], dtype=mx.uint64)
    best = mx.sort(mx.partition(keys, kth=k - 1, axis=-1)[:, :k], axis=-1)
    return (best & 0xFFFFFFFF).astype(mx.uint32)
