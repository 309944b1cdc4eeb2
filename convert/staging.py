"""A folder that appears under its name only when it is complete."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen.errors import ConversionError

from .report import readable_size


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise ConversionError when `target` exists and may not be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(f"{target} exists. Choose another --mlx-path, or replace it with --overwrite.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConversionError(f"{target} is no model folder, so --overwrite does not replace it. Choose another path.")


def check_apart(target: Path, source: Path) -> None:
    """Raise ConversionError when replacing `target` would remove the source."""
    if target.resolve() == source.resolve() or target.resolve() in source.resolve().parents:
        raise ConversionError(f"{target} holds the source {source}. Choose another --mlx-path.")


def check_space(target: Path, needed: int) -> None:
    """Raise ConversionError when the disk of `target` has less than `needed` bytes free."""
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ConversionError(
            f"The output needs {readable_size(needed)}, but only {readable_size(free)} are free in {parent}. "
            "Free some space, or choose another --mlx-path."
        )


def _remove_abandoned(target: Path) -> None:
    """Remove what conversions to `target` left that were killed."""
    for partial in target.parent.glob(f"{glob.escape(target.name)}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(partial, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to fill; renamed to `target` at the end, removed when anything goes wrong.

    An existing `target` is replaced at that moment and not before. OSErrors become ConversionErrors.
    """
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        partial.mkdir()
        try:
            yield partial
            _sync_folder(partial)
            _swap(partial, target)
            _sync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConversionError(_advice(error, target)) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to a new file and put it on the disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _swap(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f"{target.name}.replaced-{os.getpid()}")
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advice(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "The disk is full: free some space, or choose another --mlx-path"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        step = "Choose an --mlx-path in a folder that you may write to"
    else:
        step = "Check the disks and try again"
    return f"{target} was not written ({error}). {step}; nothing was left there."
