"""A folder that appears under its name only when it is complete."""

import errno
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.errors import ConversionError

from .journal import Journal, is_journal, locked

DOWNLOADS = "downloads"
_MODEL = "model"
_JOURNAL = "journal"
_REPLACED = "replaced"
_DISCARDED = "discarded"
_FINDER = ".DS_Store"
# What is removed; anything else in a workspace is somebody's own.
_MADE = (_MODEL, DOWNLOADS, _DISCARDED, _FINDER)


def real_target(target: Path) -> Path:
    """The folder that `target` names: where a link leads, so that work and output lie on that disk.

    Raises ConversionError for a link that leads in a circle.
    """
    if not target.is_symlink():
        return target
    try:
        return target.resolve(strict=False)
    except (OSError, RuntimeError) as error:
        raise ConversionError(f"{target} is a link that leads nowhere ({error}). Choose another --mlx-path.") from error


def check_target(target: Path, *, overwrite: bool) -> None:
    """Raise ConversionError when `target` exists and may not be replaced."""
    if not target.exists():
        return
    try:
        is_model = target.is_dir() and (not any(target.iterdir()) or (target / "config.json").is_file())
    except OSError as error:
        raise ConversionError(advice(error, target)) from error
    if not is_model:
        raise ConversionError(
            f"{target} exists and is no model folder, which --overwrite does not replace either. Choose another "
            "--mlx-path."
        )
    if not overwrite:
        raise ConversionError(f"{target} exists. Choose another --mlx-path, or replace it with --overwrite.")
    with suppress(FileNotFoundError):  # somebody removed the present folder
        if _holds(target, Path.cwd()):
            raise ConversionError(f"{target} holds the folder that you are in. Change to one outside it first.")


def check_apart(target: Path, source: Path) -> None:
    """Raise ConversionError when replacing `target`, or clearing its workspace, would remove the source."""
    for folder in (target, work_folder(target)):
        if folder.exists() and _holds(folder, source):
            raise ConversionError(f"{folder} holds the source {source}. Choose another --mlx-path.")


def check_workspace(target: Path) -> None:
    """Raise ConversionError when `work_folder(target)` holds what no unfinished conversion can have left."""
    work = work_folder(target)
    if work.is_symlink():
        found = "it is a link"
    elif work.is_dir():
        try:
            names = {path.name for path in work.iterdir()} - {_FINDER}
            if not names or is_journal(work / _JOURNAL, alone=names == {_JOURNAL}):
                return
        except FileNotFoundError:  # another process has just finished
            return
        except OSError as error:
            raise ConversionError(advice(error, target)) from error
        found = f"it holds {', '.join(sorted(names)[:3])}"
    elif work.exists():
        found = "it is a file"
    else:
        return
    raise ConversionError(
        f"{work} is where an unfinished conversion to {target} lies, but {found}. Expected nothing there, or what such "
        "a conversion left. Move it away, or choose another --mlx-path."
    )


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where a conversion works: `folder` becomes the target, `downloads` goes; `journal` tells what `folder` holds."""

    folder: Path
    downloads: Path
    journal: Journal

    def start_afresh(self, reason: str) -> None:
        """Forget what `journal` recorded, remove what `folder` holds, and warn of the `reason`."""
        warnings.warn(f"{self.folder.parent} cannot be gone on with: {reason} This one starts afresh.", stacklevel=5)
        _remove(self.folder)
        self.folder.mkdir()
        self.journal.begin()


def work_folder(target: Path) -> Path:
    """The sibling of `target` that holds an unfinished conversion to it."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def staged(target: Path, fingerprint: str, *, resume: bool = True, overwrite: bool = False) -> Iterator[Workspace]:
    """A workspace beside `target`; what it made is renamed to `target` at the end, and not before.

    What an interrupted conversion of the same `fingerprint` left is gone on with, unless `resume` is False. After an
    interruption, or an OSError, which becomes a ConversionError, the workspace stays; after any other error it goes,
    unless pieces are recorded that the same conversion would go on from.
    """
    work = work_folder(target)
    check_workspace(target)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / _JOURNAL) as descriptor:
            _settle(work, target)
            check_target(target, overwrite=overwrite)  # another process may have made it since the first check
            journal = _prepare(work, Journal(descriptor, fingerprint, resume=resume))
            space = Workspace(work / _MODEL, work / DOWNLOADS, journal)
            try:
                for folder in (space.folder, space.downloads):
                    folder.mkdir(exist_ok=True)
                # No reader takes a folder without it for a model, and this one is about to be written to.
                (space.folder / "config.json").unlink(missing_ok=True)
                yield space
                _sync_folder(space.folder)
                _swap(space.folder, target, work / _REPLACED)
                _sync_folder(target.parent)
            except (OSError, KeyboardInterrupt, ConversionError):
                raise
            except BaseException:
                if not journal.last.pieces:
                    _remove_workspace(work, target, journal)
                raise
            _remove_workspace(work, target, journal)
    except OSError as error:
        raise ConversionError(advice(error, target)) from error


def _holds(folder: Path, path: Path) -> bool:
    """Whether `path` is `folder` or lies in it."""
    # Not by name: disks of a Mac take upper and lower case for the same.
    return any(folder.samefile(place) for place in (path.resolve(), *path.resolve().parents))


def _settle(work: Path, target: Path) -> None:
    """End a replacement that was cut off: between its two renames the old model comes back, after them it goes."""
    replaced, discarded = work / _REPLACED, work / _DISCARDED
    if replaced.exists():
        _remove(discarded)
        replaced.rename(discarded if target.exists() else target)


def _prepare(work: Path, journal: Journal) -> Journal:
    """Empty `work` of what is not this conversion's."""
    if journal.holds_other_work:
        warnings.warn(
            f"{work} holds an unfinished conversion of other settings or files. It is removed, and this one starts "
            "afresh.",
            stacklevel=5,
        )
    if not journal.found:
        for name in _MADE:
            _remove(work / name)
        journal.begin()
        _sync_folder(work)
    return journal


def _remove_workspace(work: Path, target: Path, journal: Journal) -> None:
    """Remove what a conversion made. The journal goes last, so that what a kill leaves is known for what it is."""
    with suppress(OSError):
        _settle(work, target)
        journal.begin()
        for name in _MADE:
            _remove(work / name)
        if list(work.iterdir()) == [work / _JOURNAL]:
            shutil.rmtree(work)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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


def advice(error: OSError, target: Path) -> str:
    """What to tell somebody whose conversion to `target` ended with `error`."""
    work = work_folder(target)
    if error.errno in (errno.EACCES, errno.EPERM) and error.filename and work in Path(str(error.filename)).parents:
        step = f"Give yourself the right to read and write {error.filename}"
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        step = "The disk is full: free some space, or choose another --mlx-path"
    elif error.errno == errno.EFBIG:
        step = "The disk takes no files as large as 5 GB: choose an --mlx-path on another"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT):
        step = "Choose an --mlx-path in a folder that you may write to"
    else:
        step = "Check the disks and try again"
    kept = f"{work} holds what is done: the same command goes on from there" if work.exists() else "nothing was left"
    return f"{target} was not written ({error}). {step}; {kept}."
