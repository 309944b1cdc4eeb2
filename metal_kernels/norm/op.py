"""What a model calls: norms of the residual stream, with the choice between kernel and reference."""

import mlx.core as mx

from metal_kernels._backend import takes_kernel
from metal_kernels.norm import kernel, reference


def rms_norm(x: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype | None = None) -> mx.array:
    """Root-mean-square norm in fp32, rounded once (Zhang and Sennrich, 2019).

    The kernel takes rows of 8 to 8192 elements at any strides. It differs from the reference by the order of the sum
    of squares alone: within 4e-7 of the exact value in fp32, and of the reference by what that one's sum is off (2e-6
    on a CPU); in bf16 and fp16, at most one unit in the last place.

    Args:
        x: [..., D], any float dtype.
        weight: fp32 [D], the factor itself.
        eps: added to the mean of squares.
        dtype: of the result; x's by default.

    Returns:
        [..., D] in `dtype`.
    """
    dtype = dtype or x.dtype
    if takes_kernel("rms_norm", kernel.unsupported(x, weight, dtype)):
        return kernel.rms_norm(x, weight, eps, dtype)
    return reference.rms_norm(x, weight, eps, dtype)


def add_rms_norm(x: mx.array, branch: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """Add a branch to the residual stream and norm the sum.

    The sum stays in fp32, whatever is added to it: rounding the stream after every branch is what moves a bf16 model's
    logits most. The kernel's sum is the reference's bit for bit; shapes and tolerance of its norm are those of
    `rms_norm`.

    Args:
        x: [..., D], the stream, fp32 or (before the first branch) any float dtype.
        branch: [..., D], any float dtype.
        weight: fp32 [D], the norm's factor.
        eps: added to the mean of squares.

    Returns:
        the stream x + branch, fp32 [..., D], and its norm in branch's dtype.

    Raises:
        ValueError: x and branch differ in shape.
    """
    if x.shape != branch.shape:
        raise ValueError(f"add_rms_norm: the branch is {branch.shape}, expected the stream's shape {x.shape}")
    if takes_kernel("add_rms_norm", kernel.unsupported(x, weight, branch.dtype)):
        return kernel.add_rms_norm(x, branch, weight, eps)
    return reference.add_rms_norm(x, branch, weight, eps)
