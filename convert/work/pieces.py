"""Cuts the work into pieces of a few MB, so that memory does not grow with the size of a tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Source
from mlx_qwen.checkpoint.matrices import unpacked
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.errors import ConversionError

from ..arrays import FLOATS, all_finite, as_bytes, as_float32
from ..outputs import Output
from ..quantize.correction import corrected_rows
from ..quantize.inputs import Corrections
from ..quantize.rows import PackedRows, Run, searched_rows
from ..quantize.scales import MOST_FITTED_BITS

PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start:stop of one source, which become the rows of `output` from `first_row` on.

    `rows` is None for a tensor that is produced whole, because its axes change order or it is small.
    """

    output: Output
    source: Source
    rows: tuple[int, int] | None = None
    first_row: int = 0

    @property
    def nbytes(self) -> int:
        """How many bytes of the source's main array are read."""
        info = self.source.tensor
        if self.rows is None:
            return info.nbytes
        stored = self.source.matrix
        return stored.nbytes * (self.rows[1] - self.rows[0]) // stored.shape[0]


@dataclass(frozen=True, slots=True)
class Result:
    """The arrays of a piece as bytes, in the order of the output's entries.

    `finite` says whether the output's dtype reaches as far as its values; `exact` whether scales and biases that came
    with codes kept their values.
    """

    data: tuple[npt.NDArray[np.uint8], ...]
    finite: bool
    exact: bool = True


class DamagedPieceError(ConversionError):
    """The source holds values in `piece` that are NaN or infinite."""

    def __init__(self, piece: Piece) -> None:
        super().__init__(f"{piece.output.name} holds NaN or infinite values as it is stored. Download it again.")
        self.piece = piece


def cut(output: Output) -> Iterator[Piece]:
    """The pieces of one output, in order, each of about PIECE_BYTES of the source."""
    target, first_row = output.target, 0
    if not _is_cuttable(output):
        yield Piece(output, target.sources[0])
        return
    for source in target.sources:
        stored = source.matrix
        start, end = source.rows or (0, stored.shape[0])
        step = max(1, PIECE_BYTES * stored.shape[0] // max(stored.read_bytes, 1))
        for row in range(start, end, step):
            stop = min(row + step, end)
            yield Piece(output, source, (row, stop), first_row)
            first_row += stop - row


def produce(piece: Piece, corrections: Corrections | None = None, run: Run = map) -> Result:
    """Read one piece and bring it into the form of its output; safe to call in any thread.

    `corrections` say how to round the tensors of the layer that calibration has seen; `run` as in `searched_rows`.
    Raises DamagedPieceError for values that are not finite before anything is done to them.
    """
    stored, wanted = piece.output.target.quantization, piece.output.quantization
    if stored is not None and stored == wanted:
        return _copied(piece)
    dense = dense_values(piece)
    result = _searched(piece, dense, corrections, run) or _cast(piece, dense)
    if not result.finite and not is_finite(dense):
        raise DamagedPieceError(piece)
    return result


def is_finite(values: mx.array) -> bool:
    """Whether a float array holds neither NaN nor infinity."""
    return all_finite(as_bytes(values), next(kind for kind in FLOATS.values() if kind.mlx == values.dtype))


def _searched(piece: Piece, dense: mx.array, corrections: Corrections | None, run: Run) -> Result | None:
    """The piece with codes, scales and biases that lose least; None where nearest codes, or no codes, are wanted."""
    output, wanted = piece.output, piece.output.quantization
    if wanted is None or wanted.mode != "affine" or output.quantizer == "rtn":
        return None
    packed = _corrected(piece, dense, corrections)
    if packed is None and wanted.bits <= MOST_FITTED_BITS:
        packed = searched_rows(_matrix(dense), wanted, output.dtype, run)
    return None if packed is None else Result(packed.data, packed.is_finite)


def _cast(piece: Piece, dense: mx.array) -> Result:
    """The piece in the output's dtype, or with the nearest codes to that."""
    kind, wanted = FLOATS[piece.output.dtype], piece.output.quantization
    dense = dense.astype(kind.mlx)
    values = as_bytes(dense)
    finite = all_finite(values, kind)
    if wanted is None:
        return Result((values,), finite)
    arrays = mx.quantize(dense, group_size=wanted.group_size, bits=wanted.bits, mode=wanted.mode)
    mx.eval(*arrays)
    return Result(tuple(as_bytes(array) for array in arrays), finite)


def _corrected(piece: Piece, dense: mx.array, corrections: Corrections | None) -> PackedRows | None:
    """The rows rounded by what calibration saw, expert by expert; None for tensors that it did not see."""
    spec, wanted = piece.output.target.spec, piece.output.quantization
    if corrections is None or wanted is None or spec.name not in corrections:
        return None
    rows = as_float32(_matrix(dense))
    if not np.isfinite(rows).all():
        raise DamagedPieceError(piece)
    share = spec.shape[-2] if len(spec.shape) > 2 else None
    first, parts = 0, []
    while first < len(rows):
        at = piece.first_row + first
        expert = None if share is None else at // share
        last = len(rows) if share is None else min(len(rows), first + share - at % share)
        how = corrections.of(spec.name, expert)
        parts.append(corrected_rows(rows[first:last], wanted, piece.output.dtype, how))
        first = last
    return PackedRows.joined(parts)


def _matrix(array: mx.array) -> mx.array:
    """All leading axes counted as rows."""
    return array.reshape(-1, array.shape[-1])


def _copied(piece: Piece) -> Result:
    """The packed arrays as they are: packing them again would only add errors."""
    weight, *rest = _packed(piece)
    kind = FLOATS[piece.output.dtype]
    if all(array.dtype == mx.uint8 for array in rest):
        sound_values(piece)
        return Result(tuple(as_bytes(array) for array in (weight, *rest)), finite=True)
    cast = [array.astype(kind.mlx) for array in rest]
    exact = all(
        mx.array_equal(array, narrow.astype(array.dtype)).item() for array, narrow in zip(rest, cast, strict=True)
    )
    floats = tuple(as_bytes(array) for array in cast)
    finite = all(all_finite(data, kind) for data in floats)
    if not finite and not all(map(is_finite, rest)):
        raise DamagedPieceError(piece)
    return Result((as_bytes(weight), *floats), finite, exact)


def sound_values(piece: Piece) -> mx.array:
    """`dense_values`; raises DamagedPieceError where one is NaN or infinite."""
    values = dense_values(piece)
    if not is_finite(values):
        raise DamagedPieceError(piece)
    return values


def dense_values(piece: Piece) -> mx.array:
    """The values of a piece as MLX lays them out, in whatever dtype they come; in fp32 if the source is packed."""
    target = piece.output.target
    if target.quantization is not None:
        weight, *rest = _packed(piece)
        return unpacked(weight, rest[0], rest[1] if len(rest) > 1 else None, target.quantization)
    if piece.rows is None:
        return target.arrange(piece.source.tensor.read())
    return piece.source.matrix.read(*piece.rows)


def _packed(piece: Piece) -> list[mx.array]:
    target = piece.output.target
    infos: list[TensorInfo | None] = [piece.source.tensor, target.scales, target.biases]
    assert piece.rows is not None, "packed matrices are cut by rows"
    return [info.as_rows().read(*piece.rows) for info in infos if info is not None]


def _is_cuttable(output: Output) -> bool:
    target, info = output.target, output.target.sources[0].tensor
    if target.stacked or target.quantization is not None:
        return True
    return len(info.shape) > 1 and info.shape == target.spec.shape and not target.shift
