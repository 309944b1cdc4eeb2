"""A folder that appears under its name only when it is complete."""

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.convert.measures import readable_size
from mlx_qwen.errors import ConversionError

from .journal import Journal, locked

DOWNLOADS = "downloads"
_JOURNAL = "journal"
_REPLACED = "replaced"


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise ConversionError when `target` exists and may not be replaced."""
    if not target.exists():
        return
    if not overwrite:
        raise ConversionError(f"{target} exists. Choose another --mlx-path, or replace it with --overwrite.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").is_file()):
        raise ConversionError(f"{target} is no model folder, so --overwrite does not replace it. Choose another path.")


def check_apart(target: Path, source: Path) -> None:
    """Raise ConversionError when replacing `target`, or clearing its workspace, would remove the source."""
    for folder in (target.resolve(), work_folder(target).resolve()):
        if folder == source.resolve() or folder in source.resolve().parents:
            raise ConversionError(f"{folder} holds the source {source}. Choose another --mlx-path.")


def check_space(target: Path, needed: int) -> None:
    """Raise ConversionError when the disk of `target` has less than `needed` bytes free.

    What an unfinished conversion to `target` takes counts as free, as this one goes on with it or removes it.
    """
    parent = next(path for path in target.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free + _taken(work_folder(target))
    if free < needed:
        raise ConversionError(
            f"The output needs {readable_size(needed)}, but only {readable_size(free)} are free in {parent}. "
            "Free some space, or choose another --mlx-path."
        )


def _taken(folder: Path) -> int:
    """Bytes that the files below `folder` take on the disk, without their holes."""
    taken = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may be at work there
            taken += path.lstat().st_blocks * 512
    return taken


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a conversion works: `folder` becomes the target, `downloads` goes; `journal` tells what `folder` holds."""

    folder: Path
    downloads: Path
    journal: Journal


def work_folder(target: Path) -> Path:
    """The sibling of `target` that holds an unfinished conversion to it."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def staged(target: Path, fingerprint: str, *, resume: bool = True, overwrite: bool = False) -> Iterator[Workspace]:
    """A workspace beside `target`; what it made is renamed to `target` at the end, and not before.

    What an interrupted conversion of the same `fingerprint` left is gone on with, unless `resume` is False. After an
    interruption, or an OSError, which becomes a ConversionError, the workspace stays; after any other error it goes.
    """
    work = work_folder(target)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / _JOURNAL) as descriptor:
            _restore(work, target)
            check_target(target, overwrite=overwrite)  # another process may have made it since the first check
            journal = _prepare(work, Journal(descriptor, fingerprint, resume=resume))
            space = Workspace(work / "model", work / DOWNLOADS, journal)
            try:
                for folder in (space.folder, space.downloads):
                    folder.mkdir(exist_ok=True)
                yield space
                _sync_folder(space.folder)
                _swap(space.folder, target, work / _REPLACED)
                _sync_folder(target.parent)
            except (OSError, KeyboardInterrupt, ConversionError):
                raise
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ConversionError(_advice(error, target)) from error


def _restore(work: Path, target: Path) -> None:
    """Bring back a model whose replacement was cut off between two renames."""
    replaced = work / _REPLACED
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _prepare(work: Path, journal: Journal) -> Journal:
    """Empty `work` of what is not this conversion's."""
    if journal.holds_other_work:
        warnings.warn(
            f"{work} holds an unfinished conversion of other settings or files. It is removed, and this one starts "
            "afresh.",
            stacklevel=5,
        )
    if not journal.found:
        for path in work.iterdir():
            if path.name != _JOURNAL:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        journal.begin()
        _sync_folder(work)
    return journal


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file that appears whole or not at all, and put it on the disk."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _swap(folder: Path, target: Path, replaced: Path) -> None:
    if not target.exists():
        folder.rename(target)
        return
    target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        replaced.rename(target)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advice(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "The disk is full: free some space, or choose another --mlx-path"
    elif error.errno == errno.EFBIG:
        step = "The disk takes no files as large as 5 GB: choose an --mlx-path on another"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        step = "Choose an --mlx-path in a folder that you may write to"
    else:
        step = "Check the disks and try again"
    work = work_folder(target)
    kept = f"{work} holds what is done: the same command goes on from there" if work.exists() else "nothing was left"
    return f"{target} was not written ({error}). {step}; {kept}."
