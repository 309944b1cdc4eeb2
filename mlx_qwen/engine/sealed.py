"""Safetensors files that are whole or not there, and tell by a digest when a byte has changed."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.headers import PREFIX_BYTES, header_length, parse_header

Tensors: TypeAlias = Mapping[str, mx.array]
Bytes: TypeAlias = bytes | memoryview

_DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U8": mx.uint8,
    "U32": mx.uint32,
    "I32": mx.int32,
    "I64": mx.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_DIGEST = "digest"
_TEMPORARY = ".tmp"
_number = count()


class DamagedError(ValueError):
    """A file that is not as it was written; the message says in what."""


def raw(tensor: mx.array) -> memoryview:
    """The bytes of a tensor, which any thread can read: its own where it is contiguous, else a copy."""
    data = mx.contiguous(tensor).reshape(-1).view(mx.uint8)
    mx.eval(data)
    return np.array(data, copy=False).data


def header(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors' bytes in a safetensors file."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in tensors.items():
        span = [at, at + tensor.nbytes]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        at = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text


def parse(content: memoryview, path: Path) -> dict[str, mx.array]:
    """The tensors of a file's bytes; raises ValueError for what is no safetensors file."""
    length = header_length(bytes(content[:PREFIX_BYTES]), len(content))
    stored = parse_header(bytes(content[PREFIX_BYTES : PREFIX_BYTES + length]), path, len(content))
    return {name: _tensor(content[entry.begin : entry.end], entry.dtype, entry.shape) for name, entry in stored.items()}


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a file that `read` accepts, under its name once it is whole; OSError leaves what was there before."""
    digest = _digest(metadata, header(tensors, {}), (raw(tensor) for tensor in tensors.values()))
    first = header(tensors, {**metadata, _DIGEST: digest})

    def chunks() -> Iterator[Bytes]:
        yield first
        for tensor in tensors.values():
            yield raw(tensor)

    write_whole(path, chunks())


def read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors and metadata of a file that `write` made; raises DamagedError for any other, and OSError."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            prefix = file.read(PREFIX_BYTES)
            text = file.read(header_length(prefix, size))
            stored = parse_header(text, path, size)
            metadata = json.loads(text).get("__metadata__") or {}
            digest = metadata.pop(_DIGEST, None)
        except (ValueError, AttributeError, TypeError) as error:
            raise DamagedError(f"its header cannot be read: {error}") from error
        if digest is None:
            raise DamagedError("it holds no digest")
        tensors, contents = {}, []
        for name, entry in stored.items():
            data = memoryview(file.read(entry.end - entry.begin))
            contents.append(sha256(data).digest())
            tensors[name] = _tensor(data, entry.dtype, entry.shape)
    as_written = header(tensors, {**metadata, _DIGEST: digest}) == prefix + text
    if not as_written or digest != _sealed(metadata, header(tensors, {}), contents):
        raise DamagedError("its bytes are not those that were written")
    return tensors, metadata


def write_whole(path: Path, chunks: Iterable[Bytes]) -> None:
    """Write a file that has its name only once it is whole; an OSError leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_number)}{_TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def is_temporary(path: Path) -> bool:
    """Whether `write_whole` was stopped at this file, or is at it."""
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def _digest(metadata: Mapping[str, str], described: bytes, contents: Iterable[Bytes]) -> str:
    return _sealed(metadata, described, [sha256(data).digest() for data in contents])


def _sealed(metadata: Mapping[str, str], described: bytes, contents: Iterable[bytes]) -> str:
    digest = sha256(json.dumps(metadata, sort_keys=True).encode())
    digest.update(described)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def _tensor(data: memoryview, dtype: str, shape: tuple[int, ...]) -> mx.array:
    if dtype not in _DTYPES:
        raise DamagedError(f"a tensor has dtype {dtype}, expected one of {', '.join(_DTYPES)}")
    return mx.array(np.frombuffer(data, np.uint8)).view(_DTYPES[dtype]).reshape(shape)
