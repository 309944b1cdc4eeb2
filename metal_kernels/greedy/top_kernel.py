"""Launches of `top_tokens.metal`."""

from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels.greedy import kernel
from metal_kernels.greedy.reference import Top

_FILE = Path(__file__).with_name("top_tokens.metal")
# Built for these numbers of tokens, the least that is enough; the lists of all parts fill a threadgroup's memory.
_COUNTS = (8, 20, 40, 64)

_PARTS = MetalKernel(
    file=_FILE,
    function="mlx_qwen::top_of_parts",
    inputs=("logits",),
    outputs=("best", "scores", "largest", "sums"),
    template=("T", "PARTS", "PER_THREAD", "K"),
    arguments=(
        *("logits", "logits_shape", "best", "scores", "largest", "sums"),
        *("threadgroup_position_in_grid", "thread_position_in_threadgroup"),
        *("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup"),
        *("shared_orders", "shared_tokens", "shared_values"),
    ),
    threadgroup_arrays=("uint shared_orders[8 * K]", "uint shared_tokens[8 * K]", "float shared_values[16]"),
)
_MERGE = MetalKernel(
    file=_FILE,
    function="mlx_qwen::top_of_all",
    inputs=("best", "scores", "largest", "sums"),
    outputs=("tokens", "logits", "total"),
    template=("PARTS", "K"),
    arguments=(
        *("best", "scores", "largest", "sums", "tokens", "logits", "total"),
        *("threadgroup_position_in_grid", "thread_position_in_threadgroup"),
        *("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup", "shared_orders", "shared_tokens"),
    ),
    threadgroup_arrays=("uint shared_orders[PARTS * K]", "uint shared_tokens[PARTS * K]"),
)


def unsupported(logits: mx.array, k: int) -> str | None:
    """Why the kernels do not rank these logits, or None when they do."""
    return kernel.unsupported(logits) or (None if 1 <= k <= min(_COUNTS[-1], logits.shape[1]) else "k")


def top_tokens(logits: mx.array, k: int) -> Top:
    """See `metal_kernels.greedy.top_tokens`; inputs as `unsupported` allows."""
    n, V = logits.shape
    count = next(count for count in _COUNTS if count >= k)
    parts, threads = kernel.parts_of(V), kernel.THREADS
    found = _PARTS(
        [logits],
        [logits.dtype, parts, -(-V // (parts * threads)), count],
        grid=(threads * parts, n, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(n, parts, count), (n, parts, count), (n, parts), (n, parts)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32, mx.float32],
    )
    tokens, scores, total = _MERGE(
        found,
        [parts, count],
        grid=(threads, n, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(n, count), (n, count), (n, 1)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return Top(tokens[:, :k], scores[:, :k], total)
