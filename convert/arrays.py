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
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.asarray(plain)).reshape(-1).view(np.uint8)


def all_finite(data: npt.NDArray[np.uint8], kind: FloatType) -> bool:
    """Whether floats of `kind`, given as bytes, hold neither NaN nor infinity.

    With the sign bit first, +inf and NaN are the largest signed patterns and -inf and NaN the largest unsigned ones:
    two maxima, far cheaper than a test of every element.
    """
    if not data.size:
        return True
    negative_infinity = kind.infinity | 1 << (8 * kind.itemsize - 1)
    return bool(data.view(kind.signed).max() < kind.infinity and data.view(kind.bits).max() < negative_infinity)
