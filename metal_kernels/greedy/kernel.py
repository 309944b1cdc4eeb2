"""Launches of `best_tokens.metal`."""

from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels.greedy.reference import Best

_FILE = Path(__file__).with_name("best_tokens.metal")
_DTYPES = (mx.float32, mx.bfloat16, mx.float16)
THREADS = 256
# Threadgroups a row, and logits for which one more pays; at least as many as make buffers of 8 elements.
_FEWEST, _MOST, _SHARE = 8, 64, 4096
_MOST_PER_THREAD = 32

_PARTS = MetalKernel(
    file=_FILE,
    function="mlx_qwen::best_of_parts",
    inputs=("logits",),
    outputs=("best", "largest", "sums"),
    template=("T", "PARTS", "PER_THREAD"),
    arguments=(
        *("logits", "logits_shape", "best", "largest", "sums"),
        *("threadgroup_position_in_grid", "thread_position_in_threadgroup"),
        *("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup", "shared_values", "shared_tokens"),
    ),
    threadgroup_arrays=("float shared_values[32]", "uint shared_tokens[32]"),
)
_JOIN = MetalKernel(
    file=_FILE,
    function="mlx_qwen::best_of_all",
    inputs=("best", "largest", "sums"),
    outputs=("tokens", "logprobs", "total"),
    template=("PARTS",),
    arguments=(
        *("best", "largest", "sums", "tokens", "logprobs", "total"),
        *("threadgroup_position_in_grid", "thread_index_in_simdgroup"),
    ),
)


def unsupported(logits: mx.array) -> str | None:
    """Why the kernels do not take these logits, or None when they do."""
    if logits.dtype not in _DTYPES:
        return "dtype"
    # MLX passes arrays of fewer than 8 elements in another address space.
    if logits.ndim != 2 or not 8 <= logits.shape[1] <= _MOST * THREADS * _MOST_PER_THREAD:
        return "shape"
    return "empty input" if logits.size == 0 else None


def parts_of(vocab_size: int) -> int:
    """Threadgroups among which a row is divided."""
    return max(_FEWEST, min(_MOST, -(-vocab_size // _SHARE)))


def best_tokens(logits: mx.array) -> Best:
    """See `metal_kernels.greedy.best_tokens`; inputs as `unsupported` allows."""
    n, V = logits.shape
    parts = parts_of(V)
    found = _PARTS(
        [logits],
        [logits.dtype, parts, -(-V // (parts * THREADS))],
        grid=(THREADS * parts, n, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(n, parts)] * 3,
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    tokens, logprobs, total = _JOIN(
        found,
        [parts],
        grid=(32, n, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(n,), (n,), (n, 1)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return Best(tokens, logprobs, total)
