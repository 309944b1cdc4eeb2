"""What an engine calls: the best token of logits, with the choice between kernel and reference."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.greedy import kernel, reference
from metal_kernels.greedy.reference import Best


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
