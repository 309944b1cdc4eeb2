"""Measures what the connection between ranks gives: how long sums over all ranks take, by their size."""

from statistics import median
from time import perf_counter
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.model.collectives import summed
from mlx_qwen.model.network import Network, is_gathered, sent_bytes

# Bytes of a token at the widths of 35B, 122B and 397B, and of pieces of prompts, in bf16.
SIZES = (4096, 6144, 8192, 1 << 20, 16 << 20)
_WARMING, _RUNS, _LARGE_RUNS, _LARGE = 2, 12, 5, 1 << 20
# Sums that follow each other in one evaluation, as those of a token's layers do.
_CHAINED = 16


class Sum(NamedTuple):
    """A sum over all ranks of `nbytes` a rank: seconds, the median of its runs.

    Where the GPU computes, the way to the CPU, which sends, and back is part of it.
    """

    nbytes: int
    seconds: float


def sums(group: "mx.distributed.Group", sizes: tuple[int, ...] = SIZES) -> list[Sum]:
    """The time of each size; all ranks measure together."""
    found = []
    for nbytes in sizes:
        x, is_large, times = mx.zeros((nbytes // 2,), mx.bfloat16), nbytes >= _LARGE, []
        chained = 1 if is_large else _CHAINED
        for _ in range(_WARMING + (_LARGE_RUNS if is_large else _RUNS)):
            mx.eval(x)
            started = perf_counter()
            for _ in range(chained):
                x = summed(0.5 * x, group).astype(x.dtype)
            mx.eval(x)
            times.append((perf_counter() - started) / chained)
        found.append(Sum(nbytes, median(times[_WARMING:])))
    return found


def network_of(measured: list[Sum], ranks: int) -> Network:
    """The network that explains the quickest sum of a token's size, and the largest sum."""
    quickest, largest = min(one.seconds for one in measured), max(measured)
    waiting = quickest if is_gathered(largest.nbytes, ranks) else 2 * quickest
    return Network(quickest, sent_bytes(largest.nbytes, ranks) / max(largest.seconds - waiting, 1e-9))
