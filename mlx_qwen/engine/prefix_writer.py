"""The folder of checkpoints: what its files are called and hold, the thread that writes them, and what is removed."""

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from queue import Full, Queue
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx

from mlx_qwen.engine import sealed

VERSION = 1
NAMES = f"v{VERSION}-"
# How long pieces may lie there before the manifest that lists them comes.
_UNLISTED_SECONDS = 600
_CHANGED = "its bytes are not those that were written"


class Piece(NamedTuple):
    """A safetensors file to be written: its header, and its tensors' bytes."""

    header: bytes
    parts: list[memoryview]


class Manifest(NamedTuple):
    """What is written last: its file, its content, and the pieces before the ones that were written for it."""

    path: Path
    content: dict[str, Any]
    held: list[str]


Job: TypeAlias = Piece | Manifest


class Writer(threading.Thread):
    """Writes pieces as they come, and the manifest behind them; a checkpoint that fails is left out.

    `trouble` is the last failure; `on_written` is called behind each piece.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: int,
        queue: "Queue[Job | None]",
        on_written: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(name="prefix files", daemon=True)
        self.most_bytes = most_bytes
        self._folder = folder
        self._queue = queue
        self._on_written = on_written
        self._ending = False
        self._written: list[str] = []
        self._failed = False
        self.trouble: Exception | None = None

    def end(self) -> None:
        """Let the thread end behind what has come."""
        self._ending = True
        with suppress(Full):
            self._queue.put_nowait(None)

    def run(self) -> None:
        """Until `end` was called and nothing is left."""
        while not (self._ending and self._queue.empty()):
            job = self._queue.get()
            try:
                if isinstance(job, Piece) and not self._failed:
                    self._write(job)
                elif isinstance(job, Manifest):
                    self._finish(job)
            except Exception as error:
                self._failed, self.trouble = True, error
            finally:
                if isinstance(job, Manifest):
                    self._written, self._failed = [], False
                del job
                self._queue.task_done()
                if self._on_written is not None:
                    self._on_written()

    def _write(self, piece: Piece) -> None:
        chunks: list[sealed.Bytes] = [piece.header, *piece.parts]
        name = f"{NAMES}{_digest(chunks)}.safetensors"
        path = self._folder / name
        try:
            read_piece(path)
            os.utime(path)
        except (OSError, ValueError):
            sealed.write_whole(path, chunks)
        self._written.append(name)

    def _finish(self, manifest: Manifest) -> None:
        with _locked(self._folder):
            pieces = [*manifest.held, *self._written]
            if not self._failed and all((self._folder / name).exists() for name in pieces):
                content = manifest.content | {"pieces": pieces}
                sealed.write_whole(manifest.path, [_encoded(content)])
            _collect(self._folder, self.most_bytes, 0 if self._failed else _UNLISTED_SECONDS)


def _collect(folder: Path, most_bytes: int, unlisted_seconds: float) -> None:
    """Remove what no manifest lists, and the least recently used manifests as long as all take too much."""
    manifests, sizes, now = _manifests(folder), {}, time.time()
    listed = {name for _, pieces in manifests.values() for name in pieces}
    for path in folder.iterdir():
        is_temporary = sealed.is_temporary(path)
        if not is_temporary and not path.name.startswith(NAMES):
            continue
        with suppress(FileNotFoundError):
            stat = path.stat()
            is_old = now - stat.st_mtime >= (_UNLISTED_SECONDS if is_temporary else unlisted_seconds)
            if is_old and path.name not in listed and path not in manifests:
                path.unlink()
            else:
                sizes[path.name] = stat.st_size
    while sum(sizes.values()) > most_bytes and manifests:
        oldest = min(manifests, key=lambda path: manifests[path][0])
        _, pieces = manifests.pop(oldest)
        for name in [oldest.name, *set(pieces).difference(*(others for _, others in manifests.values()))]:
            (folder / name).unlink(missing_ok=True)
            sizes.pop(name, None)


def _manifests(folder: Path) -> dict[Path, tuple[float, list[str]]]:
    """When each manifest was last used, and the pieces it lists; damaged ones are removed."""
    found = {}
    for path in folder.iterdir():
        if length_of(path) is not None:
            try:
                found[path] = (path.stat().st_mtime, read_manifest(path)["pieces"])
            except (OSError, ValueError, KeyError):
                path.unlink(missing_ok=True)
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While no other process finishes a checkpoint in the folder; a process that ends lets go."""
    with (folder / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def manifest_name(length: int, digest: str) -> str:
    """What the manifest of a checkpoint of `length` tokens is called."""
    return f"{NAMES}{length}-{digest}.json"


def length_of(path: Path) -> int | None:
    """How many tokens the checkpoint of a manifest has; None for any other file."""
    named = re.fullmatch(rf"{NAMES}(\d+)-[0-9a-f]{{40}}\.json", path.name)
    return int(named[1]) if named else None


def piece_of(tensors: dict[str, mx.array]) -> Piece:
    """A piece that any thread can write."""
    return Piece(sealed.header(tensors, {}), [sealed.raw(tensor) for tensor in tensors.values()])


def read_piece(path: Path) -> memoryview:
    """The bytes of a piece; a damaged one is removed. Raises ValueError or OSError where it cannot be had."""
    content = memoryview(path.read_bytes())
    if path.name != f"{NAMES}{_digest([content])}.safetensors":
        path.unlink(missing_ok=True)
        raise sealed.DamagedError(_CHANGED)
    return content


def read_manifest(path: Path) -> dict[str, Any]:
    """What a manifest holds; raises ValueError or OSError where it cannot be had."""
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("name") != path.name:
        raise sealed.DamagedError(_CHANGED)
    content.pop("digest", None)
    if data != _encoded(content):
        raise sealed.DamagedError(_CHANGED)
    return content


def _encoded(content: dict[str, Any]) -> bytes:
    return _plain(content | {"digest": _digest([_plain(content)])})


def _plain(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _digest(chunks: Iterable[bytes | memoryview]) -> str:
    digest = sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()
