"""A source's files: which of them a conversion reads or copies, and what shows that they changed."""

from pathlib import Path

from mlx_qwen.checkpoint.shards import INDEX_NAME
from mlx_qwen.errors import CheckpointError

_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")
_REWRITTEN = ("config.json", "README.md", "quantize_config.json", "quant_config.json")
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

    Links within the folder are fine, and in the Hub's cache those to the repository's blobs.
    """
    folder = source.resolve()
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    read = [*copied_files(source), *source.glob("*.safetensors"), *(source / name for name in _READ_TOO)]
    for path in read:
        if path.is_symlink() and root not in (leads_to := path.resolve()).parents:
            raise CheckpointError(
                f"{path} is a link to {leads_to}, outside of {root}. Expected the file itself: put it there, if you "
                "trust where the folder comes from."
            )


def source_lines(folder: Path) -> list[str]:
    """The folder and its files, by name, size and time of their last change."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = ((path.name, path.stat()) for path in files)
    return [str(folder.resolve()), *(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats)]
