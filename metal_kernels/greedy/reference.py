"""The best token of logits, in plain MLX: the definition."""

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
