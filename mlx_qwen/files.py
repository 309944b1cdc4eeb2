"""The files of a checkpoint folder: which shards there are, what they hold, and reading parts of one tensor."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import read_json_object

COMPANION_PATTERN = "mlx-qwen*.safetensors"
INDEX_NAME = "model.safetensors.index.json"

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
        numpy_type, mlx_type = _DTYPES[self.dtype]
        if not self.shape:
            rows: tuple[int, ...] = ()
            count, first = 1, 0
        else:
            stop = self.shape[0] if stop is None else stop
            rows = (stop - start, *self.shape[1:])
            row_size = int(np.prod(self.shape[1:], dtype=np.int64))
            count, first = (stop - start) * row_size, start * row_size
        item = np.dtype(numpy_type).itemsize
        values = np.fromfile(self.file, dtype=numpy_type, count=count, offset=self.offset + first * item)
        if values.size != count:
            raise CheckpointError(f"{self.file} ended inside {self.name}. The file is truncated: download it again.")
        return _as_mlx(values.reshape(rows), mlx_type)

    def read_columns(self, start: int, stop: int) -> mx.array:
        """Read columns start:stop of a matrix, from pages of the file that the system may drop again."""
        numpy_type, mlx_type = _DTYPES[self.dtype]
        stored = np.memmap(self.file, dtype=numpy_type, mode="r", offset=self.offset, shape=self.shape)
        return _as_mlx(np.ascontiguousarray(stored[:, start:stop]), mlx_type)


def _as_mlx(values: npt.NDArray[np.generic], mlx_type: mx.Dtype | None) -> mx.array:
    array = mx.array(values)
    return array.view(mlx_type) if mlx_type is not None else array


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; raises CheckpointError when it is truncated or not such a file."""
    try:
        with safe_open(file, framework="numpy"):  # the library checks header, offsets and length
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({error}). It is truncated or damaged: download it again."
        ) from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{name} in {file} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}. "
                "Use a checkpoint in bf16, fp16 or fp32."
            )
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(name, file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors


def checkpoint_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder's main shards, by name, without the companion files.

    Shards are those that the index names, else `model*.safetensors`, else any other `*.safetensors`. Raises
    CheckpointError for a missing shard, a tensor that the index promises and no shard holds, or PyTorch pickles.
    """
    index = folder / INDEX_NAME
    if not index.exists():
        return _merged(_unindexed_shards(folder))
    weight_map = _weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{INDEX_NAME} names {len(shards)} shards, of which {len(missing)} are not in {folder}: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Download the missing files."
        )
    tensors = _merged(folder / name for name in shards)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            f"{INDEX_NAME} lists {len(lost)} tensors that no shard holds, such as {lost[0]} in {weight_map[lost[0]]}. "
            "The shards and the index are of different versions: download the folder again."
        )
    return tensors


def companion_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the companion files: MTP and exact norms, which other MLX readers do not look for."""
    return _merged(sorted(folder.glob(COMPANION_PATTERN)))


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f'{index} has no entry "weight_map", as a safetensors index has. Download it again.')
    names = {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    outside = [shard for shard in names.values() if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, expected plain file names. Do not use this checkpoint.")
    return names


def _unindexed_shards(folder: Path) -> list[Path]:
    companions = set(folder.glob(COMPANION_PATTERN))
    shards = sorted(folder.glob("model*.safetensors")) or sorted(set(folder.glob("*.safetensors")) - companions)
    if shards:
        return shards
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder} holds PyTorch pickles only, which can run code when opened. Expected safetensors: download the "
            "safetensors files of the same model, or save it again with transformers' save_pretrained()."
        )
    raise CheckpointError(f"{folder} holds no *.safetensors file. Expected a complete model folder.")


def _merged(files: Iterable[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands in {tensors[name].file.name} and in {file.name}. "
                    "Remove the shards of other versions."
                )
            tensors[name] = info
    return tensors
