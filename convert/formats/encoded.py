"""What a foreign format gives the converter: matrices that are decoded while they are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_qwen.checkpoint.remote import RemoteTensor
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

RowReader = Callable[[int, int], mx.array]
Tensors = Mapping[str, TensorInfo]


class Matrix(Protocol):
    """One encoded matrix [N, K], known from the headers of the tensors that hold it."""

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K]: output rows and input columns."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """Every stored tensor that belongs to the matrix."""

    def values(self, start: int, stop: int) -> mx.array:
        """Rows start:stop as the exact fp32 numbers that they stand for."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The matrices of all experts of a layer, [N, K] each, in stored tensors [experts, …] that are `parts`."""

    members: tuple[Matrix, ...]
    parts: tuple[TensorInfo, ...]


Format = Callable[[Json, Tensors], Mapping[str, Matrix | Stack]]
"""Finds the matrices of a format, by module name, from the settings in config.json and the stored tensors."""


@dataclass(frozen=True, slots=True)
class Computed(TensorInfo):
    """An array of 4-byte items that `readers` compute, one reader for each of its equal shares of rows.

    It stands for a stored tensor, so that the planning and cutting of plain checkpoints serve for these too; `nbytes`
    counts what is stored, in `holders`.
    """

    readers: tuple[RowReader, ...]
    holders: frozenset[Path]

    @property
    def files(self) -> frozenset[Path]:
        """The files of every part."""
        return self.holders

    @property
    def read_bytes(self) -> int:
        """How many bytes of memory the whole array takes once it is read."""
        return 4 * prod(self.shape)

    @property
    def is_computed(self) -> bool:
        """Always: nothing of the file is read as it stands."""
        return True

    def entry(self, index: int) -> "Computed":
        """Expert `index` of a stacked array."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], nbytes=nbytes, readers=self.readers[index : index + 1])

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Compute entries start:stop of the leading axis, all by default."""
        inner = self.shape[1:-1]
        first, last = (row * prod(inner) for row in (start, self.shape[0] if stop is None else stop))
        share = prod(self.shape[:-1]) // len(self.readers)
        rows = [
            self.readers[i](max(first - i * share, 0), min(last - i * share, share))
            for i in range(first // share, -(-last // share))
        ]
        return mx.concatenate(rows).reshape(-1, *inner, self.shape[-1])


@dataclass(frozen=True, slots=True)
class Encoded(Computed):
    """One whose stored tensors are in a format of another runtime."""


def encoded(
    name: str, parts: tuple[TensorInfo, ...], shape: tuple[int, ...], readers: tuple[RowReader, ...], dtype: str = "F32"
) -> Encoded:
    """The array of `shape` and `dtype` that `readers` compute from `parts`, under a name that plans know."""
    nbytes, holders = sum(part.nbytes for part in parts), frozenset(part.file for part in parts)
    return Encoded(name, parts[0].file, dtype, shape, 0, nbytes, readers, holders)


def required(tensors: Tensors, name: str, owner: str) -> TensorInfo:
    """The tensor `name`, without which `owner` cannot be decoded; raises CheckpointError when it is missing."""
    if name not in tensors:
        raise CheckpointError(
            f"{owner} is stored without {name}, which it cannot be decoded without. A shard is missing or of another "
            "version: download the folder again."
        )
    return tensors[name]


def matrix_shape(info: TensorInfo) -> tuple[int, int]:
    """The shape of a tensor that has two axes; raises CheckpointError for others, and for empty ones."""
    if len(info.shape) != 2 or not prod(info.shape):
        raise CheckpointError(
            f"{info.name} in {info.file.name} has shape {list(info.shape)}, expected a matrix. The file is damaged, or "
            "quantized in a way that config.json does not describe: download the folder again."
        )
    return info.shape[0], info.shape[1]


def expect_shape(info: TensorInfo, shape: tuple[int, ...], owner: str) -> None:
    """Raises CheckpointError when `info`, which decodes `owner`, has another shape."""
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name} in {info.file.name} has shape {list(info.shape)}, expected {list(shape)} for {owner}. "
            "The file is damaged, or quantized in a way that config.json does not describe: download the folder again."
        )


def is_elsewhere(info: TensorInfo) -> bool:
    """Whether reading the tensor, however small, would take a request to the Hub: too slow for one a module."""
    return isinstance(info, RemoteTensor) and not info.file.is_file()


def powers_of_two(exponents: mx.array) -> mx.array:
    """2^(e − 127) in fp32, exactly: e is the exponent field of such a number, but for e = 0."""
    fields = exponents.astype(mx.uint32)
    return mx.where(fields == 0, 1 << 22, fields << 23).astype(mx.uint32).view(mx.float32)
