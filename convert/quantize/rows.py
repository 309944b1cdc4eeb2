"""Rows of a matrix as MLX's affine arrays, each group by the grid that loses least."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Quantization

from ..arrays import FLOATS, patterns, stored_bytes, widened
from ..settings import DType
from .packing import packed
from .scales import Floats, nearest_codes, searched_grids

# Larger than caches like it, so that threads seldom wait for the interpreter's lock between two passes.
_BLOCK_WEIGHTS = 1 << 19

Plain = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """R rows: uint32 words [R, K · bits / 32], and fp32 scales and biases [R, K / g] as `dtype` holds them."""

    words: npt.NDArray[np.uint32]
    scales: Floats
    biases: Floats
    dtype: DType

    @classmethod
    def joined(cls, parts: "Sequence[PackedRows]") -> "PackedRows":
        """Parts of one dtype, their rows one below the other."""
        words, scales, biases = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("words", "scales", "biases")
        )
        return cls(words, scales, biases, parts[0].dtype)

    @property
    def data(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """Weight, scales and biases as bytes, as a checkpoint stores them."""
        kind = FLOATS[self.dtype]
        floats = (stored_bytes(array, kind) for array in (self.scales, self.biases))
        return (self.words.reshape(-1).view(np.uint8), *floats)

    @property
    def is_finite(self) -> bool:
        """Whether all rows were, and `dtype` is wide enough for their scales and biases."""
        return bool(np.isfinite(self.scales).all() and np.isfinite(self.biases).all())


Run = Callable[[Callable[[Plain], PackedRows], Iterable[Plain]], Iterator[PackedRows]]


def searched_rows(rows: mx.array, precision: Quantization, dtype: DType, run: Run = map) -> PackedRows:
    """Pack rows [R, K] of any float type; the error of no group is above that of `mx.quantize`.

    A group that is not finite gets a scale of NaN, as it cannot be stored. See `searched_grids` for the rest. `run`
    maps over blocks of rows, which need no MLX: in threads if wanted.
    """
    step = max(1, _BLOCK_WEIGHTS // rows.shape[1])
    plain = patterns(rows)
    blocks = (plain[i : i + step] for i in range(0, len(plain), step))
    return PackedRows.joined(list(run(lambda block: _searched(widened(block), precision, dtype), blocks)))


def _searched(rows: Floats, precision: Quantization, dtype: DType) -> PackedRows:
    groups = rows.reshape(-1, precision.group_size)
    with np.errstate(invalid="ignore", over="ignore"):
        grids = searched_grids(groups, precision.bits, dtype)
        positions = grids.positions(groups)
        codes = nearest_codes(positions, precision.bits, out=positions)
    if not np.isfinite(grids.scales).all():
        np.nan_to_num(codes, copy=False)
    words = packed(codes.astype(np.uint8).reshape(rows.shape), precision.bits)
    return PackedRows(words, grids.scales.reshape(len(rows), -1), grids.biases.reshape(len(rows), -1), dtype)
