"""Tells a checkpoint from any other whose models remember other states."""

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
        stat = file.stat()
        digest.update(f"\n{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(PREFIX_BYTES), "little")
            digest.update(opened.read(min(length, stat.st_size)))
            opened.seek(max(0, stat.st_size - _ENDS))
            digest.update(opened.read())
    return digest.hexdigest()
