"""Sizes for people, and what some work takes of time and memory."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds, how far the process's peak memory rose, and the most that MLX's arrays took, in bytes."""

    seconds: float = 0.0
    peak_memory: int = 0
    mlx_peak_memory: int = 0


def measured_cost() -> Callable[[], Cost]:
    """Begin to measure; returns a function that tells the cost since then."""
    started, resident = time.perf_counter(), peak_resident_bytes()
    mx.reset_peak_memory()
    return lambda: Cost(time.perf_counter() - started, peak_resident_bytes() - resident, mx.get_peak_memory())


def readable_size(nbytes: int) -> str:
    """`nbytes` in MB, or from 1 GB on in GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def peak_resident_bytes() -> int:
    """The most memory that this process ever had resident, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # exact, while Linux's ru_maxrss begins with the peak of the process that started this one
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
