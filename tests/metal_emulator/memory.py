"""Memory of MLX arrays as kernels see it: inputs with their real strides, outputs poisoned until written."""

import ctypes
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from tests.metal_emulator.launch import INITIALISED, MAY_STAY_UNWRITTEN, WRITABLE, Binding

# Unused bytes around every buffer, so that a stray index meets no other buffer.
_MARGIN = 1 << 16
_LINE = 64
_ALLOCATION_ALIGNMENT = 16
_POISON = 0xFF

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


@dataclass(frozen=True)
class Held:
    """A binding and the memory that has to outlive the launch.

    Of inputs also the shape, the strides in elements, and whether MLX would launch a copy first.
    """

    binding: Binding
    memory: Array
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    copied: bool = False


def hold_input(name: str, array: mx.array, *, row_contiguous: bool) -> Held:
    """A copy of an input's bytes, strides and alignment kept unless it has to be made contiguous."""
    view = _host_view(array)
    misplaced = (view.ctypes.data - _allocation_remainder()) % _ALLOCATION_ALIGNMENT
    copied = row_contiguous and not view.flags.c_contiguous
    if copied:
        view, misplaced = np.ascontiguousarray(view).reshape(view.shape), 0
    start = low = high = view.ctypes.data
    if view.size:
        low, high = np.lib.array_utils.byte_bounds(view)
    memory, shift = _set_apart(low, high - low, misplaced - (start - low))
    strides = tuple(stride // view.itemsize for stride in view.strides)
    binding = Binding(name, start + shift, low + shift, high + shift, view.itemsize, INITIALISED)
    return Held(binding, memory, view.shape, strides, copied)


def hold_value(name: str, values: Array) -> Held:
    """Shape, strides or rank of an input."""
    low = values.ctypes.data
    return Held(Binding(name, low, low, low + values.nbytes, values.itemsize, INITIALISED), values)


def hold_output(
    name: str, shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None, *, may_stay_unwritten: bool
) -> Held:
    """An output, poisoned or filled with `init_value`, between margins."""
    if init_value is not None:
        content = np.ascontiguousarray(_host_view(mx.full(shape, init_value, dtype)))
    else:
        content = np.empty(shape, dtype=_numpy_type(dtype))
        content.reshape(-1).view(np.uint8).fill(_POISON)
    memory, shift = _set_apart(content.ctypes.data, content.nbytes)
    low = content.ctypes.data + shift
    flags = WRITABLE | (INITIALISED if init_value is not None else 0)
    flags |= MAY_STAY_UNWRITTEN if may_stay_unwritten else 0
    return Held(Binding(name, low, low, low + content.nbytes, content.itemsize, flags), memory)


def output_array(held: Held, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A copy of an output as an MLX array."""
    offset = held.binding.low - held.memory.ctypes.data
    size = held.binding.high - held.binding.low
    values = held.memory[offset : offset + size].view(_numpy_type(dtype)).reshape(shape)
    array = mx.array(values)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


def _host_view(array: mx.array) -> Array:
    """The array's memory without a copy; bfloat16 as uint16."""
    bits = array
    if array.dtype == mx.bfloat16:
        bits = array.view(mx.uint16) if array.ndim else array.reshape(1).view(mx.uint16).reshape(())
    mx.eval(bits)
    return np.array(bits, copy=False)


def _numpy_type(dtype: mx.Dtype) -> np.dtype[np.generic]:
    if dtype == mx.bfloat16:
        return np.dtype(np.uint16)
    return np.array(mx.zeros((1,), dtype)).dtype


@cache
def _allocation_remainder() -> int:
    """Where MLX's allocations start, past a multiple of 16: a header of 8 bytes precedes them on the CPU."""
    return _host_view(mx.zeros((1024,))).ctypes.data % _ALLOCATION_ALIGNMENT


def _set_apart(low: int, size: int, misplaced: int = 0) -> tuple[Array, int]:
    """A copy of `size` bytes at `low` between margins, `misplaced` bytes past a cache line, and how far it moved."""
    memory = np.empty(size + 2 * _MARGIN + _LINE, dtype=np.uint8)
    offset = _MARGIN + (misplaced - memory.ctypes.data - _MARGIN) % _LINE
    if size:
        memory[offset : offset + size] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(low))
    return memory, memory.ctypes.data + offset - low
