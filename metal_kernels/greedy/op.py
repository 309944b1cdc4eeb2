"""What an engine calls: the best token of logits or the best few, with the choice between kernel and reference."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.greedy import kernel, reference, top_kernel
from metal_kernels.greedy.reference import Best, Top


def best_tokens(logits: mx.array) -> Best:
    """The likeliest token of each row, with its log-probability.

    Of equal logits the lowest id is taken, as `mx.argmax` does, and NaN never is, as on a GPU; the log-probability of a
    row with NaN is NaN. The kernels take the reference's tokens; sums within 1e-6 of the largest value. Two launches
    read the logits once, over many threadgroups, where MLX's `argmax` and `logsumexp` have one for each row.

    Args:
        logits: [n, V], any float dtype.

    Returns:
        tokens uint32 [n], log-probabilities fp32 [n], and log(sum(exp(logits))) fp32 [n, 1].
    """
    if takes_kernel("best_tokens", kernel.unsupported(logits)):
        return kernel.best_tokens(logits)
    return reference.best_tokens(logits)


def top_tokens(logits: mx.array, k: int) -> Top:
    """The k likeliest tokens of each row, likeliest first.

    Of equal logits the lowest ids are taken, and come first; NaN stands behind -inf. No id comes twice. Kernel and
    reference take the same tokens; sums within 1e-6 of the largest value. Up to 64 tokens take two launches that read
    the logits once, where `mx.argpartition` sorts a whole row on a GPU.

    Args:
        logits: [n, V], any float dtype.
        k: 1 to V.

    Returns:
        tokens uint32 [n, k], their logits fp32 [n, k], and log(sum(exp(logits))) fp32 [n, 1].
    """
    if takes_kernel("top_tokens", top_kernel.unsupported(logits, k)):
        return top_kernel.top_tokens(logits, k)
    return reference.top_tokens(logits, k)
