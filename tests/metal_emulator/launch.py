"""Calls a compiled kernel: memory for its buffers, the launch structure, and what came of it."""

import ctypes
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

Order = Literal["forward", "reverse", "random"]
Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

THREADS_PER_GROUP = 1024
_STACK_BYTES = 256 * 1024
_THREADGROUP_BYTES = 256 * 1024
_ORDERS: dict[Order, int] = {"forward": 0, "reverse": 1, "random": 2}

WRITABLE, INITIALISED, MAY_STAY_UNWRITTEN = 1, 2, 4


class FailureRecord(ctypes.Structure):
    """`Failure` of machine.h."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("buffer", ctypes.c_uint32),
        ("has_thread", ctypes.c_uint32),
        ("thread", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("offset", ctypes.c_int64),
        ("text", ctypes.c_char * 200),
    )


class BufferRecord(ctypes.Structure):
    """`Buffer` of machine.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_uint64),
        ("granularity", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("read_lines", ctypes.c_uint64),
        ("written_lines", ctypes.c_uint64),
        ("unique_read_lines", ctypes.c_uint64),
        ("unique_written_lines", ctypes.c_uint64),
    )


class LaunchRecord(ctypes.Structure):
    """`Launch` of machine.h."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("order", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(BufferRecord)),
        ("buffer_count", ctypes.c_uint32),
        ("stack_bytes", ctypes.c_uint32),
        ("stacks", ctypes.c_void_p),
        ("threadgroup_memory", ctypes.c_void_p),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("failure", FailureRecord),
    )


@dataclass
class Binding:
    """Memory for one parameter: `start` is the address of the first element, inside `low..high`."""

    name: str
    start: int
    low: int
    high: int
    itemsize: int
    flags: int


@dataclass(frozen=True)
class Outcome:
    """A finished launch: the failure (its kind is 0 when there is none) and one record per binding."""

    failure: FailureRecord
    buffers: Sequence[BufferRecord]


def run(
    library: Path,
    bindings: Sequence[Binding],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    order: Order,
    seed: int,
) -> Outcome:
    """Runs every thread of the grid; returns early at the first failure."""
    function = _load(library)
    arguments = (ctypes.c_void_p * max(1, len(bindings)))(*(binding.start for binding in bindings))
    buffers = (BufferRecord * max(1, len(bindings)))(
        *(BufferRecord(b.low, b.high - b.low, b.itemsize, b.flags) for b in bindings)
    )
    launch = LaunchRecord(
        grid=(ctypes.c_uint32 * 3)(*grid),
        threadgroup=(ctypes.c_uint32 * 3)(*(min(t, g) for t, g in zip(threadgroup, grid, strict=True))),
        order=_ORDERS[order],
        seed=seed * 2654435761 % 2**32,
        arguments=arguments,
        buffers=buffers,
        buffer_count=len(bindings),
        stack_bytes=_STACK_BYTES,
        stacks=_reserved(THREADS_PER_GROUP * _STACK_BYTES, "stacks"),
        threadgroup_memory=_reserved(_THREADGROUP_BYTES, "threadgroup"),
        threadgroup_bytes=_THREADGROUP_BYTES,
    )
    function(ctypes.byref(launch))
    return Outcome(launch.failure, list(buffers)[: len(bindings)])


@cache
def _load(library: Path) -> "ctypes._NamedFuncPointer":
    _share_libm()
    # PyDLL keeps the interpreter's lock: the runtime is for one thread.
    function = ctypes.PyDLL(str(library)).emulator_launch
    function.argtypes = [ctypes.POINTER(LaunchRecord)]
    function.restype = None
    return function


@cache
def _share_libm() -> None:
    """Kernels are linked without libm on Linux and find it in the process."""
    if sys.platform == "linux":
        ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)


@cache
def _reserved(size: int, _purpose: str) -> int:
    """The address of memory that the system supplies as it is touched, kept for the life of the process."""
    _kept.append(mmap.mmap(-1, size))
    return ctypes.addressof(ctypes.c_char.from_buffer(_kept[-1]))


_kept: list[mmap.mmap] = []
