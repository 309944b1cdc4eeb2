"""A source's files: which of them a conversion reads or copies, and what shows that they changed."""

import hashlib
from pathlib import Path

from mlx_qwen.checkpoint.headers import MOST_HEADER_BYTES, PREFIX_BYTES
from mlx_qwen.checkpoint.shards import INDEX_NAME
from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import ADAPTER_CONFIG

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")
_REWRITTEN = (
    *("config.json", "README.md", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    ADAPTER_CONFIG,  # merged, or left out: the output has none
)
_READ_TOO = ("config.json", "README.md", INDEX_NAME)


def copied_files(source: Path) -> list[Path]:
    """The files of `source` that the output gets unchanged, sorted by name."""
    return sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name not in _REWRITTEN
        and not path.name.endswith(".index.json")
        and (path.suffix in _SUFFIXES or path.name.startswith(_PREFIXES))
    )


def check_links(source: Path) -> None:
    """Raise CheckpointError when a file that a conversion reads is a link to somewhere outside the model.

    Links within the folder are fine, in the Hub's cache those to the repository's blobs, and from anywhere those to the
    blobs of one repository in that cache.
    """
    folder = source.resolve()
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    read = [*copied_files(source), *source.glob("*.safetensors"), *(source / name for name in _READ_TOO)]
    blobs = {path.resolve().parent for path in read if path.is_symlink() and _is_blob(path.resolve())}
    cache = blobs.pop() if len(blobs) == 1 else root
    for path in read:
        if path.is_symlink() and not {root, cache} & set((leads_to := path.resolve()).parents):
            raise CheckpointError(
                f"{path} is a link to {leads_to}, outside of {root}. Expected the file itself: put it there, if you "
                "trust where the folder comes from."
            )


def _is_blob(path: Path) -> bool:
    """Whether a file is one of a model in the Hub's cache, as `models--owner--name/blobs` holds them."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def source_lines(folder: Path) -> list[str]:
    """The folder and its files: name, size, times and inode, and what the headers of weights say.

    A file that was replaced is told by its inode or the time of that, where its size and its own time are as before.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return [str(folder.resolve()), *map(_line, files)]


def _line(path: Path) -> str:
    stat = path.stat()
    line = f"{path.name} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
    if path.suffix != ".safetensors":
        return line
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX_BYTES), "little")
        return f"{line} {hashlib.sha256(file.read(min(length, MOST_HEADER_BYTES))).hexdigest()}"
