"""Safetensors files written in pieces: the headers are known in advance, so no tensor is ever whole in memory."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.headers import ITEM_SIZES, PREFIX_BYTES
from mlx_qwen.checkpoint.shards import TensorInfo

SHARD_BYTES = 5 * 10**9
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Entry:
    """One array to write: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_SIZES[self.dtype]


class SafetensorsWriter:
    """Files `<stem>.safetensors` or `<stem>-00001-of-0000N.safetensors` of known tensors, filled in any order.

    A context manager, which closes the files. `write` may be called from several threads. `sync` puts on the disk what
    was written so far; `finish` does so too and insists that every byte of every tensor was written. No reader takes a
    file for safetensors before all its tensors are complete and on the disk. Files that an earlier writer of the same
    tensors left are gone on with: `skip` names what they hold already.
    """

    def __init__(self, folder: Path, stem: str, entries: Iterable[Entry]) -> None:
        shards = split_shards(entries, SHARD_BYTES)
        self._files: list[_File] = []
        self._by_tensor: dict[str, _File] = {}
        for i, shard in enumerate(shards, 1):
            name = f"{stem}-{i:05d}-of-{len(shards):05d}" if len(shards) > 1 else stem
            file = _File(folder / f"{name}.safetensors", shard)
            self._files.append(file)
            self._by_tensor |= dict.fromkeys((entry.name for entry in shard), file)

    def __enter__(self) -> "SafetensorsWriter":
        try:
            for file in self._files:
                file.open()
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    @property
    def is_begun(self) -> bool:
        """Whether all files are there, in full size and with their headers, as an earlier writer left them."""
        return all(file.is_begun for file in self._files)

    def write(self, name: str, data: npt.NDArray[np.uint8], first_byte: int = 0) -> None:
        """Write `data` into tensor `name`, from its byte `first_byte` on."""
        self._by_tensor[name].write(name, data, first_byte)

    def skip(self, name: str, nbytes: int) -> None:
        """Count `nbytes` of tensor `name` as written, as the file holds them."""
        self._by_tensor[name].skip(name, nbytes)

    def sync(self) -> None:
        """Put on the disk what was written so far."""
        for file in self._files:
            file.sync()

    def finish(self) -> None:
        """Put everything on the disk; raises RuntimeError if a tensor is incomplete."""
        for file in self._files:
            file.finish()

    def tensors(self) -> dict[str, TensorInfo]:
        """Where each tensor lies; its bytes are there once they are written, though the file's header is not."""
        return {name: info for file in self._files for name, info in file.tensors().items()}

    @property
    def names(self) -> list[str]:
        return [file.path.name for file in self._files]

    @property
    def weight_map(self) -> dict[str, str]:
        """The file of each tensor, sorted by tensor name, as an index lists it."""
        return {name: self._by_tensor[name].path.name for name in sorted(self._by_tensor)}


def split_shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, a new shard whenever the next would exceed `shard_bytes`; a larger one stands alone."""
    shards: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not shards or size + entry.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def header_bytes(entries: Iterable[Entry]) -> tuple[bytes, Mapping[str, int]]:
    """A file's header with its length prefix, and where in the file each tensor begins.

    Wider items come first, so that every tensor starts at a multiple of its item size.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    starts, position = {}, 0
    for entry in sorted(entries, key=lambda entry: -ITEM_SIZES[entry.dtype]):
        end = position + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [position, end]}
        starts[entry.name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    prefix = len(text).to_bytes(PREFIX_BYTES, "little") + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}


class _File:
    """One file, whose length prefix stays zero, which no reader accepts, until everything else is on the disk."""

    def __init__(self, path: Path, entries: list[Entry]) -> None:
        self.path = path
        self._missing = {entry.name: entry.nbytes for entry in entries if entry.nbytes}
        self._entries = entries
        self._lock = Lock()
        self._header, self._starts = header_bytes(entries)
        self._nbytes = len(self._header) + sum(entry.nbytes for entry in entries)
        self._descriptor: int | None = None
        self._unsynced = True

    @property
    def is_begun(self) -> bool:
        header = memoryview(self._header)[PREFIX_BYTES:]
        try:
            with self.path.open("rb") as file:
                file.seek(PREFIX_BYTES)
                return os.fstat(file.fileno()).st_size == self._nbytes and file.read(len(header)) == header
        except FileNotFoundError:
            return False

    def open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        # At once in full size, with holes, so that one that lost its end can be told.
        os.ftruncate(self._descriptor, self._nbytes)
        self._put(memoryview(bytes(PREFIX_BYTES) + self._header[PREFIX_BYTES:]), 0)

    def write(self, name: str, data: npt.NDArray[np.uint8], first_byte: int) -> None:
        self._put(data.data, self._starts[name] + first_byte)
        self.skip(name, data.size)
        self._unsynced = True

    def skip(self, name: str, nbytes: int) -> None:
        with self._lock:
            self._missing[name] -= nbytes
            if not self._missing[name]:
                del self._missing[name]

    def tensors(self) -> dict[str, TensorInfo]:
        return {
            entry.name: TensorInfo(
                entry.name, self.path, entry.dtype, entry.shape, self._starts[entry.name], entry.nbytes
            )
            for entry in self._entries
        }

    def sync(self) -> None:
        if not self._unsynced:
            return
        self._unsynced = False
        is_complete = not self._missing
        os.fsync(self._opened)
        if is_complete:
            self._put(memoryview(self._header[:PREFIX_BYTES]), 0)
            os.fsync(self._opened)

    def finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"{self.path.name} was finished before {next(iter(self._missing))} was complete")
        self._unsynced = True
        self.sync()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @property
    def _opened(self) -> int:
        if self._descriptor is None:
            raise RuntimeError(f"{self.path.name} is written only inside its `with` block")
        return self._descriptor

    def _put(self, data: memoryview, position: int) -> None:
        while data:
            written = os.pwrite(self._opened, data, position)
            data, position = data[written:], position + written
