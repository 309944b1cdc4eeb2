"""Parts of stored matrices, read from their shards without the rest: what one of several ranks needs of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Source, Target
from mlx_qwen.checkpoint.matrices import LazyFiles, Matrix, lazy_matrix, module_name, packed_matrix
from mlx_qwen.checkpoint.names import EXACT_ROLES, Role, TensorSpec
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """Runs of rows of a matrix [..., N, K] (or of entries of a vector), one after the other, or one run of columns.

    `spans` count rows or columns of the matrix as it is unpacked.
    """

    axis: Literal["rows", "columns"]
    spans: tuple[Span, ...]

    @property
    def size(self) -> int:
        """How many rows or columns are taken."""
        return sum(stop - start for start, stop in self.spans)

    def shape(self, whole: tuple[int, ...], *, is_expert: bool) -> tuple[int, ...]:
        """The shape of what is taken of a tensor of shape `whole`."""
        axis = len(whole) - 1 if self.axis == "columns" else int(is_expert)
        return (*whole[:axis], self.size, *whole[axis + 1 :])


class SlicedTensors(Mapping[str, Matrix]):
    """The tensors of `targets` by module name, as `read_matrices` gives them, of which `cut` tells the parts to take.

    They are read each time they are asked for, and held by nobody else; only those of the vision tower stay on the disk
    until their arrays are used.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        config: ModelConfig,
        dtype: mx.Dtype | None,
        cut: Callable[[TensorSpec], Cut | None],
    ) -> None:
        self._targets = {module_name(target.spec.name, config): target for target in targets}
        self._dtype, self._cut, self._files = dtype, cut, LazyFiles()

    def __getitem__(self, name: str) -> Matrix:
        weight = self._targets.get(f"{name}.weight") or self._targets[name]
        matrix, bias = self._read(weight), self._targets.get(f"{name}.bias")
        if bias is None or self._is_empty(bias):
            return matrix
        return matrix.with_bias(self._read(bias).weight)

    def __iter__(self) -> Iterator[str]:
        return (name.removesuffix(".weight") for name in self._targets if not name.endswith(".bias"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _is_empty(self, target: Target) -> bool:
        cut = self._cut(target.spec)
        return cut is not None and not cut.size

    def _read(self, target: Target) -> Matrix:
        spec = target.spec
        if spec.role is Role.VISION:
            return lazy_matrix(target, self._files, self._dtype)
        rows = spec.shape[1 if spec.role is Role.EXPERT else 0]
        return read_cut(target, self._cut(spec) or Cut("rows", ((0, rows),)), self._dtype)


def read_cut(target: Target, cut: Cut, dtype: mx.Dtype | None) -> Matrix:
    """The part of a tensor that `cut` names, read at once; `dtype` as in `read_matrices`.

    Columns of packed matrices begin and end where groups do.
    """
    if target.quantization is not None:
        bits, group_size = target.quantization.bits, target.quantization.group_size
        weight, scales, biases = (
            None if info is None else _read(info, cut, per_item, is_expert=target.spec.role is Role.EXPERT)
            for info, per_item in (
                (target.sources[0].tensor, (32, bits)),
                (target.scales, (group_size, 1)),
                (target.biases, (group_size, 1)),
            )
        )
        assert weight is not None, "a packed matrix has codes"
        return _held(packed_matrix(target, weight, scales, biases, dtype))
    parts = [_read_source(target, source, cut) for source in target.sources]
    weight = target.arrange(mx.stack(parts) if target.stacked else parts[0])
    dtype = mx.float32 if target.spec.role in EXACT_ROLES else dtype
    return _held(Matrix(weight if dtype is None else weight.astype(dtype)))


def _held(matrix: Matrix) -> Matrix:
    held = Matrix(matrix.weight, matrix.scales, matrix.biases, matrix.quantization, is_held=True)
    mx.eval(held.arrays())
    return held


def _read_source(target: Target, source: Source, cut: Cut) -> mx.array:
    """What `cut` takes of one of the stored matrices that a dense target is made of."""
    if source.index is None or source.rows is None:
        is_whole = target.spec.role is Role.EXPERT and not target.stacked
        return _read(source.tensor, cut, is_expert=is_whole)
    first, last = source.rows
    info = source.tensor.entry(source.index)
    if cut.axis == "columns":
        ((start, stop),) = cut.spans
        return _part(info, slice(first, last), slice(start, stop))
    return _read(info, Cut("rows", tuple((first + start, first + stop) for start, stop in cut.spans)))


def _read(info: TensorInfo, cut: Cut, per_item: tuple[int, int] = (1, 1), *, is_expert: bool = False) -> mx.array:
    """What `cut` takes of a stored array, in whose columns each `per_item[0]` weights are `per_item[1]` items."""
    before = (slice(None),) * (len(info.shape) - 1 if cut.axis == "columns" else int(is_expert))
    weights, items = per_item if cut.axis == "columns" else (1, 1)
    runs = [_part(info, *before, slice(start * items // weights, stop * items // weights)) for start, stop in cut.spans]
    return runs[0] if len(runs) == 1 else mx.concatenate(runs, axis=len(before))


def _part(info: TensorInfo, *part: slice) -> mx.array:
    if info.is_computed:
        return info.read()[part]
    return info.read_part(*part) if len(part) > 1 else info.read(part[0].start, part[0].stop)
