"""RMS norms of the residual stream, in plain MLX: the definition."""

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """See `metal_kernels.norm.rms_norm`."""
    return mx.fast.rms_norm(x.astype(mx.float32), weight, eps).astype(dtype)


def add_rms_norm(x: mx.array, branch: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """See `metal_kernels.norm.add_rms_norm`."""
    total = x.astype(mx.float32) + branch
    return total, rms_norm(total, weight, eps, branch.dtype)
