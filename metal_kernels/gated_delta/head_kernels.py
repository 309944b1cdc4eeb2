"""What kernels have in common that give each value head a threadgroup, as `head.h` lays it out."""

import mlx.core as mx

from metal_kernels._choices import choices
from metal_kernels.gated_delta.layer import Heads

_MOST_TAPS = 8
# Half of the 32 that Metal allows a threadgroup: with more, the registers of a thread would not fit.
_MOST_SIMDGROUPS = 16
DTYPES = (mx.float32, mx.bfloat16, mx.float16)
THREAD = (
    "threadgroup_position_in_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
)


def threads(kernel: str, heads: Heads) -> tuple[int, int]:
    """Rows of a head's state that a lane works on and SIMD groups that share a head, for `kernel`.

    A lane then holds at most 32 values of the state at a time.
    """
    rows = 2 if heads.key_dim <= 128 else 1
    suited = min(_MOST_SIMDGROUPS, heads.value_dim // (4 * rows))
    return rows, choices().threads(kernel, 32 * suited) // 32


def unsupported_sizes(heads: Heads, conv_state: mx.array) -> str | None:
    """Why kernels do not take heads or a conv_state of these sizes, or None when they do."""
    if any(size % 32 or not 32 <= size <= 256 for size in (heads.key_dim, heads.value_dim)):
        return "head size not a multiple of 32 up to 256"
    if not 1 <= conv_state.shape[1] < _MOST_TAPS:
        return f"not 2 to {_MOST_TAPS} taps"
    return "empty input" if conv_state.size == 0 else None
