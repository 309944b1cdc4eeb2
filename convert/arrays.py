"""Arrays between MLX, numpy and bytes: dtypes by their three names, and what is not a finite number."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .settings import DType


@dataclass(frozen=True, slots=True)
class FloatType:
    """A float dtype: its safetensors name, and unsigned integers of its width with the pattern of +infinity."""

    stored: str
    mlx: mx.Dtype
    bits: type[np.unsignedinteger]
    signed: type[np.signedinteger]
    infinity: int

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.bits).itemsize)


FLOATS: dict[DType, FloatType] = {
    "bfloat16": FloatType("BF16", mx.bfloat16, np.uint16, np.int16, 0x7F80),
    "float16": FloatType("F16", mx.float16, np.uint16, np.int16, 0x7C00),
    "float32": FloatType("F32", mx.float32, np.uint32, np.int32, 0x7F800000),
}


def as_bytes(array: mx.array) -> npt.NDArray[np.uint8]:
    """The elements of `array` in row-major order, as little-endian bytes; evaluates it."""
    return np.ascontiguousarray(patterns(array)).reshape(-1).view(np.uint8)


def all_finite(data: npt.NDArray[np.uint8], kind: FloatType) -> bool:
    """Whether floats of `kind`, given as bytes, hold neither NaN nor infinity.

    With the sign bit first, +inf and NaN are the largest signed patterns and -inf and NaN the largest unsigned ones:
    two maxima, far cheaper than a test of every element.
    """
    if not data.size:
        return True
    negative_infinity = kind.infinity | 1 << (8 * kind.itemsize - 1)
    return bool(data.view(kind.signed).max() < kind.infinity and data.view(kind.bits).max() < negative_infinity)


def rounded(values: npt.NDArray[np.float32], kind: FloatType) -> npt.NDArray[np.float32]:
    """fp32 values rounded to the nearest that `kind` holds, ties to even, still as fp32."""
    if kind.mlx == mx.float32:
        return values.astype(np.float32, copy=False)
    if kind.mlx == mx.float16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    upper = words + (np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1)))
    return (upper & np.uint32(0xFFFF0000)).view(np.float32)


def stored_bytes(values: npt.NDArray[np.float32], kind: FloatType) -> npt.NDArray[np.uint8]:
    """fp32 values that `kind` holds exactly, as little-endian bytes of that type."""
    if kind.mlx == mx.bfloat16:
        stored: npt.NDArray[np.generic] = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    else:
        stored = values.astype(np.float16 if kind.mlx == mx.float16 else np.float32)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def as_float32(array: mx.array) -> npt.NDArray[np.float32]:
    """A float array in fp32; evaluates it."""
    return widened(patterns(array))


def patterns(array: mx.array) -> npt.NDArray[np.generic]:
    """An array as numpy holds it, bf16 as uint16, without a copy; evaluates it."""
    plain: npt.NDArray[np.generic] = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return plain


def widened(plain: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """What `patterns` gave of a float array, or some rows of it, in fp32."""
    if plain.dtype != np.uint16:
        return plain.astype(np.float32, copy=False)
    upper = plain.astype(np.uint32)
    upper <<= np.uint32(16)
    return upper.view(np.float32)
