"""Parity probes: every kernel beside its reference, on the machine at hand."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from metal_kernels._backend import ENVIRONMENT_VARIABLE, Backend, reset_stats, stats

Arrays = Sequence[mx.array]


@dataclass(frozen=True, slots=True)
class Probe:
    """One kernel's call; `run` gives the same arrays on either backend, to `tolerance` of the largest value."""

    kernel: str
    run: Callable[[], Arrays]
    tolerance: float = 1e-5


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What a probe saw: largest difference over largest value, and medians in milliseconds on both backends.

    `failure` is why there is no comparison: what Metal said when it could not build or run the kernel, or why the
    reference ran in its place. `error` and the times are then None.
    """

    kernel: str
    tolerance: float
    error: float | None = None
    kernel_ms: float | None = None
    reference_ms: float | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def run_probe(probe: Probe, *, repeats: int = 5) -> ProbeResult:
    """Run one probe as kernel and as reference; a kernel that cannot be built is a result, not an exception."""
    expected, reference_ms = _timed(probe.run, Backend.REFERENCE, repeats)
    reset_stats()
    try:
        found, kernel_ms = _timed(probe.run, Backend.METAL, repeats)
    except (RuntimeError, ValueError) as failure:
        return ProbeResult(probe.kernel, probe.tolerance, failure=str(failure))
    reasons = {reason for op in stats().values() for reason in op.reference}
    if reasons:
        return ProbeResult(probe.kernel, probe.tolerance, failure=f"the reference ran: {', '.join(sorted(reasons))}")
    error = difference(found, expected)
    return ProbeResult(probe.kernel, probe.tolerance, error, kernel_ms, reference_ms)


@contextmanager
def forced(choice: Backend) -> Iterator[None]:
    """Run with MLX_QWEN_KERNELS set to `choice`."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = choice.value
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def _timed(run: Callable[[], Arrays], choice: Backend, repeats: int) -> tuple[Arrays, float]:
    with forced(choice):
        outputs, times = run(), []
        mx.eval(outputs)
        for _ in range(repeats):
            started = time.perf_counter()
            mx.eval(run())
            times.append(time.perf_counter() - started)
    return outputs, 1e3 * sorted(times)[len(times) // 2]


def difference(found: Arrays, expected: Arrays) -> float:
    """The largest difference over the largest value, the worst of several arrays."""
    return max(_error(a, b) for a, b in zip(found, expected, strict=True))


def _error(found: mx.array, expected: mx.array) -> float:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    a, b = found.astype(mx.float32), expected.astype(mx.float32)
    largest = mx.maximum(mx.abs(b).max(), 1e-30)
    difference = mx.nan_to_num(mx.abs(a - b).max() / largest, nan=float("inf")).item()
    assert isinstance(difference, float), "a ratio of two fp32 numbers"
    return difference
