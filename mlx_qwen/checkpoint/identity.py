"""Tells a checkpoint from any other whose models remember other states."""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.headers import PREFIX_BYTES

_ENDS = 64 << 10


def model_identity(folder: Path, dtype: mx.Dtype) -> str:
    """What tells a model from any other whose states are not the same: a digest, hex.

    It is made of config.json and of each weight file's header, size, time of change and last 64 KiB, and of the
    activations' dtype.
    """
    digest = blake2b(f"{dtype}\n".encode(), digest_size=16)
    config = folder / "config.json"
    digest.update(config.read_bytes() if config.is_file() else b"")
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"\n{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
        for part in _telling(file):
            digest.update(part)
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    """What tells a file of a checkpoint from its copies elsewhere that are not the same, hex.

    Other files are read as a whole; of weights, which may be large, size, header and last 64 KiB are.
    """
    digest = blake2b(f"{file.stat().st_size}\n".encode(), digest_size=16)
    for part in _telling(file) if file.suffix == ".safetensors" else [file.read_bytes()]:
        digest.update(part)
    return digest.hexdigest()


def _telling(file: Path) -> Iterator[bytes]:
    """The header and the last 64 KiB of a file of weights."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(PREFIX_BYTES), "little")
        yield opened.read(min(length, size))
        opened.seek(max(0, size - _ENDS))
        yield opened.read()
