"""Shards of a Hub repository, on the disk only while pieces need them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Condition, Event, Thread

from mlx_qwen.checkpoint.remote import Repository
from mlx_qwen.errors import ConversionError

from ..source.origin import AHEAD
from .pieces import Piece


class Supply:
    """Downloads the files of `pieces` into `folder`, in the order in which they are needed, and removes them again.

    A context manager, in which a thread downloads. At most AHEAD files are there at a time, unless a single piece needs
    more. `wait` may be called from several threads; `done` and `remove_finished` from one, in the order of the pieces.
    """

    def __init__(self, repository: Repository, folder: Path, pieces: Sequence[Piece]) -> None:
        self._repository, self._folder, self._pieces = repository, folder, pieces
        self._uses = Counter(file for piece in pieces for file in files_of(piece))
        self._order = list(dict.fromkeys(file for piece in pieces for file in sorted(files_of(piece))))
        self._changed = Condition()
        self._there: set[Path] = set()
        self._finished: list[Path] = []
        self._resident = self._written = 0
        self._error: Exception | None = None
        self._stopped = Event()
        self._thread = Thread(target=self._download_all, daemon=True)

    def __enter__(self) -> "Supply":
        for path in self._folder.iterdir():
            if path.is_file() and path not in self._uses:
                path.unlink()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
        self._thread.join()

    def wait(self, piece: Piece) -> None:
        """Return once the files of `piece` are there; raises ConversionError when they cannot be downloaded."""
        files = files_of(piece)
        with self._changed:
            self._changed.wait_for(lambda: files <= self._there or self._error is not None or self._stopped.is_set())
            if files <= self._there:
                return
        raise ConversionError(
            f"{self._error or 'The conversion ended.'} The same command goes on where this one stopped."
        ) from self._error

    def done(self, piece: Piece) -> bool:
        """Note that `piece` was written; whether it was the last one to need some file."""
        for file in files_of(piece):
            self._uses[file] -= 1
            if not self._uses[file]:
                self._finished.append(file)
        with self._changed:
            self._written += 1
            self._changed.notify_all()
        return bool(self._finished)

    def remove_finished(self) -> None:
        """Remove the files that no piece needs any more."""
        for file in self._finished:
            file.unlink()
        with self._changed:
            self._resident -= len(self._finished)
            self._changed.notify_all()
        self._finished = []

    def _download_all(self) -> None:
        try:
            for file in self._order:
                with self._changed:
                    self._changed.wait_for(lambda file=file: self._may_begin(file))  # type: ignore[misc]
                    if self._stopped.is_set():
                        return
                    self._resident += 1
                self._repository.download(file.name, self._folder, self._stopped)
                with self._changed:
                    self._there.add(file)
                    self._changed.notify_all()
        except Exception as error:  # whatever it is, those who wait must hear of it
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _may_begin(self, file: Path) -> bool:
        """With room for it, or where the next piece to be written would wait for ever."""
        if self._stopped.is_set() or self._resident < AHEAD:
            return True
        return self._written < len(self._pieces) and file in files_of(self._pieces[self._written])


def files_of(piece: Piece) -> frozenset[Path]:
    """The files that hold what `piece` reads."""
    target = piece.output.target
    infos = (piece.source.tensor, target.scales, target.biases)
    return frozenset[Path]().union(*(info.files for info in infos if info is not None))


def in_order_of_files(pieces: Iterable[Piece]) -> list[int]:
    """The places of `pieces`, ordered such that each file is needed for as short a time as possible."""
    last_files = [max(files_of(piece)) for piece in pieces]
    return sorted(range(len(last_files)), key=lambda i: last_files[i])
