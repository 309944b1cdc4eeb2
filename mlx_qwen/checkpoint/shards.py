"""The files of a checkpoint folder: which shards there are, what they hold, and reading parts of one tensor."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.headers import PREFIX_BYTES, HeaderError, Stored, header_length, parse_header
from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import read_json_object

COMPANION_PATTERN = "mlx-qwen*.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_BLOCK_BYTES = 1 << 20
_IS_MTP = re.compile(r"(?:^|\.)mtp\.")

# How numpy holds each safetensors dtype, and what MLX calls it where numpy has no such type.
_DTYPES: dict[str, tuple[type[np.generic], mx.Dtype | None]] = {
    "BOOL": (np.bool_, None),
    "U8": (np.uint8, None),
    "I8": (np.int8, None),
    "U16": (np.uint16, None),
    "I16": (np.int16, None),
    "U32": (np.uint32, None),
    "I32": (np.int32, None),
    "U64": (np.uint64, None),
    "I64": (np.int64, None),
    "F16": (np.float16, None),
    "BF16": (np.uint16, mx.bfloat16),
    "F32": (np.float32, None),
    "F64": (np.float64, None),
    "F8_E4M3": (np.uint8, None),
    "F8_E8M0": (np.uint8, None),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `dtype` is the safetensors name, `offset` counts bytes from the start of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def read_bytes(self) -> int:
        """How many bytes of memory the whole tensor takes once it is read."""
        return self.nbytes

    @property
    def is_computed(self) -> bool:
        """Whether reading computes the values from other tensors, instead of finding them in `file`."""
        return False

    @property
    def files(self) -> frozenset[Path]:
        """Every file that reading the tensor needs."""
        return frozenset({self.file})

    @property
    def actual(self) -> "TensorInfo":
        """The same with its own values, where others are read for them to spare a request."""
        return self

    def entry(self, index: int) -> "TensorInfo":
        """Entry `index` of the leading axis, as a tensor of its own."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes)

    def as_rows(self) -> "TensorInfo":
        """The same bytes as a matrix [rows, columns], all leading axes counted as rows."""
        return replace(self, shape=(prod(self.shape[:-1]), self.shape[-1]))

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        """Read entries start:stop of the leading axis from disk (all by default); 8-bit floats come as uint8.

        Only these bytes are read, so that a slice of a large tensor never costs the memory of the whole.
        """
        return _as_mlx(self._values(start, stop), _DTYPES[self.dtype][1])

    def _values(self, start: int, stop: int | None) -> npt.NDArray[np.generic]:
        """What `read` reads, as numpy holds it."""
        numpy_type, _ = _DTYPES[self.dtype]
        if not self.shape:
            rows: tuple[int, ...] = ()
            count, first = 1, 0
        else:
            stop = self.shape[0] if stop is None else stop
            rows = (stop - start, *self.shape[1:])
            row_size = int(np.prod(self.shape[1:], dtype=np.int64))
            count, first = (stop - start) * row_size, start * row_size
        values = self.load(numpy_type, count, self.offset + first * np.dtype(numpy_type).itemsize)
        if values.size != count:
            raise CheckpointError(f"{self.file} ended inside {self.name}. The file is truncated: download it again.")
        return values.reshape(rows)

    def load(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[np.generic]:
        """`count` items from byte `offset` of the file on, or as many as it has."""
        try:
            return np.fromfile(self.file, dtype=dtype, count=count, offset=offset)
        except OSError as error:
            raise CheckpointError(
                f"{self.file} can no longer be read ({error}). Put it back, or give yourself the right to read it."
            ) from error

    def read_columns(self, start: int, stop: int) -> mx.array:
        """Read columns start:stop of a matrix, as `read_part` does."""
        return self.read_part(slice(None), slice(start, stop))

    def read_part(self, *part: slice) -> mx.array:
        """Read what `part` slices of the leading axes, through a block of whole entries at a time.

        No file is mapped into memory: one that shrinks meanwhile would end the process.
        """
        numpy_type, mlx_type = _DTYPES[self.dtype]
        start, stop, _ = part[0].indices(self.shape[0])
        inner = np.broadcast_to(np.empty(1, dtype=numpy_type), self.shape[1:])
        found = np.empty((stop - start, *inner[part[1:]].shape), dtype=numpy_type)
        step = max(1, _BLOCK_BYTES // max(1, inner.size * inner.itemsize))
        for first in range(start, stop, step):
            last = min(first + step, stop)
            found[first - start : last - start] = self._values(first, last)[(slice(None), *part[1:])]
        return _as_mlx(found, mlx_type)


def _as_mlx(values: npt.NDArray[np.generic], mlx_type: mx.Dtype | None) -> mx.array:
    array = mx.array(values)
    return array.view(mlx_type) if mlx_type is not None else array


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises CheckpointError when it is truncated or not such a file."""
    try:
        if not file.is_file():  # opening a pipe would wait for its other end
            raise HeaderError("it is no file")
        file_bytes = file.stat().st_size
        with file.open("rb") as stream:
            length = header_length(stream.read(PREFIX_BYTES), file_bytes)
            return located(parse_header(stream.read(length), file, file_bytes), file)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{file} may not be read ({error}). Give yourself the right to read it.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}). It is truncated or damaged: download it again."
        ) from error


def located(stored: Mapping[str, Stored], file: Path) -> dict[str, TensorInfo]:
    """The tensors that a header describes, as parts of `file`."""
    return {
        name: TensorInfo(name, file, tensor.dtype, tensor.shape, tensor.begin, tensor.end - tensor.begin)
        for name, tensor in stored.items()
    }


@dataclass(frozen=True, slots=True)
class Shelf:
    """The files of a checkpoint by name, and the tensors that some of them hold, in the order of the names."""

    names: frozenset[str]
    headers: Callable[[Sequence[str]], Iterable[dict[str, TensorInfo]]]

    @classmethod
    def of(cls, folder: Path) -> "Shelf":
        """The files of a folder."""
        names = frozenset(path.name for path in folder.iterdir() if path.is_file())
        return cls(names, lambda names: (read_header(folder / name) for name in names))


def checkpoint_tensors(folder: Path, shelf: Shelf | None = None) -> dict[str, TensorInfo]:
    """Every tensor of the main shards, by name, without the companion files.

    Shards are those that the folder's index names, else `model*.safetensors`, else any other `*.safetensors`, and files
    beside them that hold an MTP layer. They are the folder's own, or those of `shelf`, where the folder holds all but
    the weights.

    Raises CheckpointError for a missing shard, an index that names tensors where they are not, one that stands beside a
    whole `model.safetensors`, or PyTorch pickles.
    """
    shelf, index = shelf or Shelf.of(folder), folder / INDEX_NAME
    weight_map = _weight_map(index) if index.exists() else None
    shards = _unindexed_shards(folder, shelf.names) if weight_map is None else sorted(set(weight_map.values()))
    missing = [name for name in shards if name not in shelf.names]
    if weight_map is not None and _SINGLE_NAME in shelf.names and _SINGLE_NAME not in shards:
        (single,) = shelf.headers([_SINGLE_NAME])
        if single.keys() & weight_map.keys():
            if not missing:
                raise CheckpointError(
                    f"{folder} holds {_SINGLE_NAME} and, in {INDEX_NAME}, {len(shards)} shards of the same tensors. "
                    "transformers would read the former, other runtimes the latter: remove the one that is old."
                )
            warnings.warn(
                f"{INDEX_NAME} in {folder} names shards that are not there, {missing[0]} for one. It is old: "
                f"{_SINGLE_NAME} is read, as transformers does.",
                stacklevel=3,
            )
            weight_map, shards, missing = None, [_SINGLE_NAME], []
    if missing:
        raise CheckpointError(
            f"{INDEX_NAME} names {len(shards)} shards, of which {len(missing)} are not in {folder}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Download the missing files."
        )
    tensors = _merged(shelf, shards)
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return {**_stray_mtp(shelf, shards, tensors), **tensors}


def _stray_mtp(shelf: Shelf, shards: Sequence[str], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of an MTP layer that lie in files beside the shards, where these have none."""
    if any(map(_IS_MTP.search, tensors)):
        return {}
    names = sorted(name for name in shelf.names if _is_weights(name) and name not in shards)
    found = _merged(shelf, [name for name in names if "mtp" in name.lower()])
    return {name: info for name, info in found.items() if _IS_MTP.search(name)}


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and not fnmatch(name, COMPANION_PATTERN)


def companion_tensors(folder: Path, shelf: Shelf | None = None) -> dict[str, TensorInfo]:
    """The tensors of the companion files: MTP and exact norms, which other MLX readers do not look for."""
    shelf = shelf or Shelf.of(folder)
    return _merged(shelf, sorted(name for name in shelf.names if fnmatch(name, COMPANION_PATTERN)))


def _check_index(weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    wrong = [name for name, shard in weight_map.items() if name not in tensors or tensors[name].file.name != shard]
    if not wrong:
        return
    name = min(wrong)
    found = f"{tensors[name].file.name} holds it" if name in tensors else "no shard holds it"
    raise CheckpointError(
        f"{INDEX_NAME} lists {len(wrong)} tensors where they are not, such as {name} in {weight_map[name]}: {found}. "
        "The shards and the index are of different versions: download the folder again."
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f'{index} has no entry "weight_map", as a safetensors index has. Download it again.')
    names = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    outside = [shard for shard in names.values() if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, expected plain file names. Do not use this checkpoint.")
    return names


def _unindexed_shards(folder: Path, names: frozenset[str]) -> list[str]:
    weights = sorted(filter(_is_weights, names))
    shards = [name for name in weights if name.startswith("model")] or weights
    if shards:
        return shards
    if any(name.endswith((".bin", ".pt", ".pth", ".bin.index.json")) for name in names):
        raise CheckpointError(
            f"{folder} holds PyTorch pickles only, which can run code when opened. Expected safetensors: download the "
            "safetensors files of the same model, or save it again with transformers' save_pretrained()."
        )
    raise CheckpointError(
        f"{folder} holds no *.safetensors file. Expected a complete model folder, or a repository with weights as "
        "safetensors: PyTorch pickles (.bin, .pt) are not read."
    )


def _merged(shelf: Shelf, names: Sequence[str]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for name, held in zip(names, shelf.headers(names), strict=True):
        for tensor, info in held.items():
            if tensor in tensors:
                raise CheckpointError(
                    f"{tensor} stands in {tensors[tensor].file.name} and in {name}. "
                    "Remove the shards of other versions."
                )
            tensors[tensor] = info
    return tensors
