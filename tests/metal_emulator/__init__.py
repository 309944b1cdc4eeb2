"""Runs kernels made for `mx.fast.metal_kernel` on the CPU, their source unchanged, and finds their faults.

    with emulated(checked=True, order="reverse") as report:
        out = kernel_under_test(...)
    report.launches[0].buffers["x"].read

It models arithmetic, indexing and synchronisation: SIMD groups of 32 lanes, barriers, threadgroup memory, matrices,
atomics. In checked mode a text must be Metal, not only C++ (`rules.py`). It does not model caches, coalescing,
occupancy, the rounding of transcendental functions, or time. It knows the place of a SIMD operation by its line: one
helper called from both sides of a branch looks like one place.
"""

from tests.metal_emulator.kernel import EmulatedKernel, emulated, metal_kernel
from tests.metal_emulator.report import KernelError, LaunchRecord, Report, Traffic

__all__ = ["EmulatedKernel", "KernelError", "LaunchRecord", "Report", "Traffic", "emulated", "metal_kernel"]
