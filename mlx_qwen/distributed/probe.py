"""Measures what the connection between ranks gives: how long sums over all ranks take, by their size."""

from statistics import median
from time import perf_counter
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.model.network import Network

# Bytes of a token at the widths of 35B, 122B and 397B, and of pieces of prompts, in bf16.
SIZES = (4096, 6144, 8192, 1 << 20, 16 << 20)
_WARMING, _RUNS, _LARGE_RUNS, _LARGE = 10, 100, 7, 1 << 20


class Sum(NamedTuple):
    """A sum over all ranks of `nbytes` a rank: seconds, the median of its runs."""

    nbytes: int
    seconds: float


def sums(group: "mx.distributed.Group", sizes: tuple[int, ...] = SIZES) -> list[Sum]:
    """The time of each size; all ranks measure together."""
    found = []
    for nbytes in sizes:
        x = mx.zeros((nbytes // 2,), mx.bfloat16)
        times = []
        for _ in range(_WARMING + (_RUNS if nbytes < _LARGE else _LARGE_RUNS)):
            started = perf_counter()
            mx.eval(mx.distributed.all_sum(x, group=group))
            times.append(perf_counter() - started)
        found.append(Sum(nbytes, median(times[_WARMING:])))
    return found


def network_of(measured: list[Sum], ranks: int) -> Network:
    """The network that explains the quickest sum of a token's size, and the largest sum."""
    quickest, largest = min(one.seconds for one in measured), max(measured)
    seconds = max(largest.seconds - quickest, 1e-9)
    return Network(quickest, 2 * (ranks - 1) / ranks * largest.nbytes / seconds)
