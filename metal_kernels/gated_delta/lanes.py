"""Two halves of the work at once: MLX runs a CPU stream on one core, so a second stream brings in a second core."""

import os
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import mlx.core as mx

_FEWEST_TOKENS = 128

Result = TypeVar("Result")


def run_in_lanes(run: Callable[[int, int], Result], size: int, tokens: int) -> list[Result]:
    """Call ``run(first, last)`` for ranges that cover 0 to ``size`` in order, and return the results in order.

    On a CPU with two cores or more the second half goes to a stream of its own, when there are tokens enough to be
    worth the synchronization. On a GPU, or for a short sequence, there is one range.

    Args:
        run: builds the graph for one range.
        size: number of independent heads or channels.
        tokens: length of the sequence.
    """
    if mx.default_device() == mx.gpu or size < 2 or tokens < _FEWEST_TOKENS or (os.cpu_count() or 1) < 2:
        return [run(0, size)]
    first = run(0, size // 2)
    with mx.stream(_second_lane()):
        return [first, run(size // 2, size)]


def join_lanes(parts: list[mx.array], axis: int) -> mx.array:
    """Concatenate the results of :func:`run_in_lanes` along the axis that was divided."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)


@cache
def _second_lane() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)
