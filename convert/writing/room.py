"""Whether the disks have room for a conversion, and take one at all, asked before the work begins."""

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_qwen.errors import ConversionError

from ..measures import readable_size
from .staging import advice, work_folder


def check_space(target: Path, needed: int, *, download: int = 0) -> None:
    """Raise ConversionError when less than `needed` bytes are free for `target`, or `download` for the Hub's cache.

    Where both lie on one disk, it must have room for both. What an unfinished conversion to `target` takes counts as
    free, as this one goes on with it or removes it.
    """
    parent = _existing_parent(target)
    free = shutil.disk_usage(parent).free + _taken(work_folder(target))
    if not download:
        if free < needed:
            raise _too_little(f"The output needs {readable_size(needed)}", free, parent, "choose another --mlx-path")
        return
    from huggingface_hub import constants

    cache = _existing_parent(Path(constants.HF_HUB_CACHE) / "models")
    elsewhere = "let HF_HOME name a folder on another disk, or convert with --stream-from-hub"
    if _on_one_disk(parent, cache):
        if free < needed + download:
            what = f"The output needs {readable_size(needed)} and the download {readable_size(download)}"
            raise _too_little(what, free, parent, f"choose an --mlx-path on another disk, {elsewhere}")
        return
    check_space(target, needed)
    free = shutil.disk_usage(cache).free
    if free < download:
        raise _too_little(f"The download needs {readable_size(download)}", free, cache, elsewhere)


def check_writable(target: Path) -> None:
    """Raise ConversionError unless a folder can be made where `target` will lie, which is tried."""
    try:
        with TemporaryDirectory(prefix=f".{target.name}.", dir=_existing_parent(target)):
            pass
    except OSError as error:
        raise ConversionError(advice(error, target)) from error


def _too_little(what: str, free: int, folder: Path, step: str) -> ConversionError:
    return ConversionError(f"{what}, but only {readable_size(free)} are free in {folder}. Free some space, or {step}.")


def _on_one_disk(a: Path, b: Path) -> bool:
    return a.stat().st_dev == b.stat().st_dev


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _taken(folder: Path) -> int:
    """Bytes that the files below `folder` take on the disk, without their holes."""
    taken = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may be at work there
            taken += path.lstat().st_blocks * 512
    return taken
