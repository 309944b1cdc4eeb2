"""Launches of `rms_norm.metal`."""

from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels._choices import choices

_FILE = Path(__file__).with_name("rms_norm.metal")
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
_WIDEST = 8192
_MOST_THREADS = 1024
_THREAD = (
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "threads_per_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "partials",
)
_RMS_NORM = MetalKernel(
    file=_FILE,
    function="mlx_qwen::rms_norm",
    inputs=("x", "weight", "eps"),
    outputs=("normed",),
    template=("X", "T", "PER_THREAD"),
    arguments=("x", "x_shape", "x_strides", "weight", "weight_strides", "eps", "normed", *_THREAD),
    threadgroup_arrays=("float partials[32]",),
    row_contiguous=False,
)
_ADD_RMS_NORM = MetalKernel(
    file=_FILE,
    function="mlx_qwen::add_rms_norm",
    inputs=("x", "branch", "weight", "eps"),
    outputs=("total", "normed"),
    template=("X", "T", "PER_THREAD"),
    arguments=(
        *("x", "x_shape", "x_strides", "branch", "branch_strides", "weight", "weight_strides", "eps"),
        *("total", "normed", *_THREAD),
    ),
    threadgroup_arrays=("float partials[32]",),
    row_contiguous=False,
)


def unsupported(x: mx.array, weight: mx.array, dtype: mx.Dtype) -> str | None:
    """Why the kernels do not take these inputs, with branch and norm of `dtype`, or None when they do."""
    if x.dtype not in _DTYPES or dtype not in _DTYPES or weight.dtype != mx.float32:
        return "dtype"
    # MLX passes arrays of fewer than 8 elements in another address space.
    if not 8 <= x.shape[-1] <= _WIDEST:
        return f"rows are not 8 to {_WIDEST} wide"
    return "empty input" if x.size == 0 else None


def rms_norm(x: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype) -> mx.array:
    """See `metal_kernels.norm.rms_norm`; inputs as `unsupported` allows."""
    return _launch(_RMS_NORM, [x], weight, eps, [dtype])[0]


def add_rms_norm(x: mx.array, branch: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """See `metal_kernels.norm.add_rms_norm`; inputs as `unsupported` allows."""
    total, normed = _launch(_ADD_RMS_NORM, [x, branch], weight, eps, [mx.float32, branch.dtype])
    return total, normed


def _launch(
    kernel: MetalKernel, arrays: list[mx.array], weight: mx.array, eps: float, dtypes: list[mx.Dtype]
) -> list[mx.array]:
    """One launch whose last output, of the last of `dtypes`, is the norm."""
    shape = arrays[0].shape
    D = shape[-1]
    rows = [x if x.ndim == 3 else x.reshape(1, -1, D) for x in arrays]
    B, T, _ = rows[0].shape
    # Four elements a thread where the row allows it: enough loads in flight, and one barrier for few SIMD groups.
    suited = min(_MOST_THREADS, 32 * -(-D // 128))
    threads = choices().threads("rms_norm" if kernel is _RMS_NORM else "add_rms_norm", suited)
    return kernel(
        [*rows, weight, mx.array(eps)],
        [arrays[0].dtype, dtypes[-1], -(-D // threads)],
        grid=(threads, T, B),
        threadgroup=(threads, 1, 1),
        output_shapes=[shape] * len(kernel.outputs),
        output_dtypes=dtypes,
    )
