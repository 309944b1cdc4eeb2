"""Headers of safetensors files, read with the suspicion that files from anywhere deserve.

A file is the length of its header (8 bytes, little-endian), the header in JSON, and the tensors one after the other.

Source: https://huggingface.co/docs/safetensors, "Format".
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from mlx_qwen.errors import CheckpointError

# Bytes of an item of each dtype that this project reads.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
PREFIX_BYTES = 8
# The largest published headers take 10 MB; safetensors itself has the same limit.
MOST_HEADER_BYTES = 100_000_000
_MOST_AXES = 16
_MOST_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header describes it; `begin` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class HeaderError(ValueError):
    """A header that describes no such file; the message completes "cannot be read as safetensors (…)"."""


def header_length(prefix: bytes, file_bytes: int) -> int:
    """How long the header is, by the file's first 8 bytes; raises HeaderError for what the file cannot hold."""
    if len(prefix) < PREFIX_BYTES:
        raise HeaderError(f"it has {file_bytes} bytes, too few for a header")
    length = int.from_bytes(prefix[:PREFIX_BYTES], "little")
    if not 0 < length <= min(MOST_HEADER_BYTES, file_bytes - PREFIX_BYTES):
        raise HeaderError(f"its header would take {length} bytes, the file has {file_bytes}")
    return length


def parse_header(header: bytes, file: Path, file_bytes: int) -> dict[str, Stored]:
    """The tensors that `header` describes, which must fill the rest of a file of `file_bytes` without gap or overlap.

    Raises HeaderError for any other header, and CheckpointError, which names `file`, for a dtype that is not read.
    """
    try:
        content = json.loads(header, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise HeaderError("its header is nested too deeply") from None
    if not isinstance(content, dict):
        raise HeaderError(f"its header is a {type(content).__name__}, expected an object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HeaderError("its __metadata__ is no object of texts")
    tensors, position = {}, PREFIX_BYTES + len(header)
    first = position
    for name, entry in sorted(content.items(), key=lambda item: _offsets(*item)):
        begin, end = _offsets(name, entry)
        stored = Stored(_dtype(name, entry, file), _shape(name, entry), first + begin, first + end)
        if stored.begin != position:
            raise HeaderError(f"{_shown(name)} begins at byte {stored.begin}, the tensor before it ends at {position}")
        if end - begin != prod(stored.shape) * ITEM_SIZES[stored.dtype]:
            raise HeaderError(f"{_shown(name)} takes {end - begin} bytes, which its shape and dtype do not make")
        tensors[name] = stored
        position = stored.end
    if position != file_bytes:
        raise HeaderError(f"its tensors end at byte {position}, the file at {file_bytes}")
    return tensors


def _without_repetition(pairs: list[tuple[str, object]]) -> Mapping[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise HeaderError(f"its header has {_shown(repeated)} twice")
    return content


def _offsets(name: str, entry: object) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise HeaderError(f"{_shown(name)} has no two data_offsets")
    return offsets[0], offsets[1]


def _shape(name: str, entry: Mapping[str, object]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_size, shape)):
        raise HeaderError(f"{_shown(name)} has no shape of at most {_MOST_AXES} sizes")
    return tuple(shape)


def _dtype(name: str, entry: Mapping[str, object], file: Path) -> str:
    dtype = entry.get("dtype")
    if dtype not in ITEM_SIZES:
        raise CheckpointError(
            f"{_shown(name)} in {file} has dtype {_shown(str(dtype))}, expected one of {', '.join(ITEM_SIZES)}. "
            "Use a checkpoint in bf16, fp16 or fp32."
        )
    return str(dtype)


def _shown(text: str) -> str:
    """Text of a stranger, short and without control characters."""
    return "".join(character if character.isprintable() else "?" for character in text[:_MOST_SHOWN])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62
