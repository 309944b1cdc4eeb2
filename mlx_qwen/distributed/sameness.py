"""What has to be the same on all ranks, and how it is said where it is not."""

import platform
import socket
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TypeAlias

from mlx_qwen.checkpoint.identity import file_digest
from mlx_qwen.errors import CheckpointError, MLXQwenError
from mlx_qwen.version import __version__, installed

# What a file, or a version, is on one rank; "" for one that is not there.
Facts: TypeAlias = Mapping[str, str]
_PACKAGES = ("mlx", "tokenizers", "llguidance")
_READ = ("*.json", "*.jinja", "*.safetensors")
_MOST_NAMED = 3


def versions() -> dict[str, str]:
    """Of this package, its sources, and the packages that decide which tokens are written."""
    own = Path(__file__).resolve().parents[1]
    digest = blake2b(digest_size=4)
    for file in sorted(own.rglob("*.py")):
        digest.update(file.relative_to(own).as_posix().encode() + file.read_bytes())
    found = {"mlx-qwen": f"{__version__} (sources {digest.hexdigest()})"}
    return found | {package: installed(package) or "" for package in _PACKAGES}


def files(folder: Path) -> dict[str, str]:
    """A digest of each file of a checkpoint that a model, its tokenizer or its template is made of, by its name."""
    return {file.name: file_digest(file) for pattern in _READ for file in sorted(folder.glob(pattern))}


def host() -> str:
    """What this machine is called."""
    return socket.gethostname() or platform.node() or "unknown"


def check_versions(rank: int, theirs: Facts, their_host: str) -> None:
    """Raises MLXQwenError unless rank `rank` runs what this one, rank 0, runs."""
    ours = versions()
    for name in sorted({*ours, *theirs}):
        here, there = ours.get(name, ""), theirs.get(name, "")
        if here != there:
            raise MLXQwenError(
                f"Ranks run different versions of {name}: rank 0 ({host()}) has {here or 'none'}, rank {rank} "
                f"({their_host}) has {there or 'none'}. Install the same on all of them."
            )


def check_files(rank: int, ours: Facts, theirs: Facts, our_folder: str, their_folder: str, their_host: str) -> None:
    """Raises CheckpointError unless rank `rank` holds the checkpoint that this one, rank 0, holds."""
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if not differing:
        return
    said = [f"{name} ({_short(ours, name)} and {_short(theirs, name)})" for name in differing[:_MOST_NAMED]]
    more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
    raise CheckpointError(
        f"Ranks hold different checkpoints: {our_folder} of rank 0 ({host()}) and {their_folder} of rank {rank} "
        f"({their_host}) differ in {', '.join(said)}{more}. Copy the whole folder from one to the other, or give "
        "--revision."
    )


def _short(facts: Facts, name: str) -> str:
    return facts[name][:8] if name in facts else "missing"
