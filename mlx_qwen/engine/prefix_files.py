"""Checkpoints that outlive the process: a folder of them, written behind the answers by a thread of its own.

A checkpoint is a manifest, a JSON file named after the tokens, the model and the precision, and the pieces it lists:
safetensors files of at most 32 MiB, named after their content. The manifest comes last, so that whatever stops the
writer leaves pieces that nobody lists, and they are removed. Pieces hold whole blocks of tokens: a longer checkpoint of
the same chain lists those of a shorter one again. Several processes can use one folder.
"""

import atexit
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from queue import Queue
from threading import RLock
from typing import NamedTuple, TypeAlias
from weakref import WeakSet, finalize

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.prefix import Found, Kind
from mlx_qwen.engine.prefix_writer import (
    VERSION,
    Job,
    Manifest,
    Writer,
    length_of,
    manifest_name,
    piece_of,
    read_manifest,
    read_piece,
)
from mlx_qwen.engine.radix import Key
from mlx_qwen.engine.sealed import parse
from mlx_qwen.engine.state_files import described, fixed_tensors, rebuilt, row_tensors
from mlx_qwen.model.chain import Packing
from mlx_qwen.model.state import State

PIECE_BYTES = 32 << 20
_HEADER_BYTES = 64 << 10
_WAITING = 2
_MOST_COMING = 16
_READERS = 4
# Seconds that a program may take longer to end for what is not on the disk yet.
_PATIENCE = 60.0
# Gives the numbers of all ranks for that of this one.
OfAll: TypeAlias = Callable[[int], list[int]]


class _Coming(NamedTuple):
    key: Key
    state: State
    kind: Kind


class PrefixFiles:
    """Checkpoints in a folder, those of one model and dtype among others; the least recently used go at `most_bytes`.

    `identity` tells the model from others; `on_written` is called from another thread whenever the writer has done a
    piece. A checkpoint that is damaged, of another model, or of a newer format is never used; one that cannot be
    written is left out. Damage and a disk that does not take any more cost one warning each. What is not written yet
    when the program ends is written then.
    """

    def __init__(
        self, folder: Path, identity: str, *, most_bytes: int, on_written: Callable[[], None] | None = None
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = identity
        self._coming: deque[_Coming] = deque(maxlen=_MOST_COMING)
        self._pieces: Iterator[Job] = iter(())
        self._queue: Queue[Job | None] = Queue(_WAITING)
        self._writer = Writer(folder, most_bytes, self._queue, on_written)
        self._writer.start()
        self._told: set[str] = set()
        self._lock = RLock()
        finalize(self, self._writer.end).atexit = False
        _open.add(self)

    @property
    def most_bytes(self) -> int:
        """What the folder may take."""
        return self._writer.most_bytes

    @most_bytes.setter
    def most_bytes(self, most_bytes: int) -> None:
        self._writer.most_bytes = most_bytes

    @property
    def is_full(self) -> bool:
        """Whether the writer has all that it can take for now."""
        return self._queue.full()

    def put(self, key: Key, state: State, kind: Kind = "prompt") -> None:
        """Have the state after all tokens of `key`, its arrays evaluated, written while `advance` is called.

        What an answer left is not written any more once a longer answer has gone on from it. The state is only read:
        nothing else depends on when it is written.
        """
        if len(state.chains) == 1 and state.padding is None and state.offset:
            with self._lock:
                kept = [one for one in self._coming if not (kind == one.kind == "answer" and _begins(one.key, key))]
                self._coming = deque([*kept, _Coming(key, _lent(state), kind)], maxlen=_MOST_COMING)

    def drop(self) -> None:
        """Write nothing of what was put but not handed on."""
        with self._lock:
            self._coming.clear()
            self._pieces = iter(())

    def advance(self) -> bool:
        """Hand the next piece to the writer, unless it is busy; whether more is to come."""
        with self._lock:
            self._tell()
            if self.is_full:
                return True
            piece = next(self._pieces, None)
            if piece is not None:
                self._queue.put(piece)
            elif self._coming:
                coming = self._coming.popleft()
                self._pieces = self._cut(coming.key, coming.state)
            else:
                return False
            return True

    def flush(self, seconds: float = float("inf")) -> None:
        """Wait until everything is on the disk, at most `seconds`."""
        until = time.monotonic() + seconds
        while (self.advance() or self._queue.unfinished_tasks) and time.monotonic() < until and self._writer.is_alive():
            if self.is_full or not self._coming:
                time.sleep(0.001)
        self._tell()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        self.flush()
        self._writer.end()
        self._writer.join()

    def take(
        self,
        key: Key,
        *,
        packing: Packing | None = None,
        mtp: bool = False,
        longer_than: int = 0,
        of_all: OfAll = lambda number: [number],
    ) -> Found | None:
        """The longest checkpoint that begins `key`, of more than `longer_than` tokens, in buffers of its own.

        `packing` and `mtp` say what kind of state is wanted: how keys and values are packed, and whether those of the
        MTP layer are there. Ranks that call this together take the longest that all of them have whole, each its share
        of it: `of_all` gives every rank's number for this one's.
        """
        with self._lock:
            stored, most = dict(self._stored(key, packing, mtp=mtp)), len(key)
            while True:
                offered = of_all(max((length for length in stored if longer_than < length <= most), default=0))
                most = min(offered)
                if not most:
                    return None
                if most == max(offered):
                    state = self._read(stored.pop(most))
                    if all(of_all(int(state is not None))) and state is not None:
                        return Found(most, state)

    def _tell(self) -> None:
        if self._writer.trouble is not None:
            self._warn(
                f"Prefixes cannot be kept in {self.folder} ({self._writer.trouble}); answers go on without. Free some "
                "space, or choose another folder."
            )

    def _warn(self, message: str) -> None:
        kind = message.split(maxsplit=1)[0]
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _stored(self, key: Key, packing: Packing | None, *, mtp: bool) -> list[tuple[int, Path]]:
        """The manifests in the folder whose tokens begin `key`, ascending, with their lengths."""
        try:
            lengths = {path.name: length_of(path) for path in self.folder.iterdir()}
        except OSError:
            return []
        there = {name: length for name, length in lengths.items() if length is not None and length <= len(key)}
        names = self._names(key, sorted(set(there.values())), packing, mtp=mtp)
        return [(length, self.folder / name) for length, name in names if name in there]

    def _names(self, key: Key, lengths: list[int], packing: Packing | None, *, mtp: bool) -> list[tuple[int, str]]:
        """What a manifest of the first `length` tokens of `key` is called, for each of the ascending `lengths`."""
        digest = blake2b(f"{VERSION} {self._identity} {packing and list(packing)} {mtp}".encode(), digest_size=20)
        ids, at, names = np.ascontiguousarray(key, np.int64), 0, []
        for length in lengths:
            digest.update(ids[at:length].data)
            at = length
            names.append((length, manifest_name(length, digest.copy().hexdigest())))
        return names

    def _read(self, path: Path) -> State | None:
        """The state of a manifest; None, and no manifest any more, where it cannot be had."""
        try:
            manifest = read_manifest(path)
            files = [self.folder / name for name in manifest["pieces"]]
            tensors: dict[str, list[mx.array]] = {}
            with ThreadPoolExecutor(_READERS) as readers:
                for file, content in zip(files, readers.map(read_piece, files), strict=True):
                    for part, tensor in parse(content, file).items():
                        tensors.setdefault(part, []).append(tensor)
            os.utime(path)
            return rebuilt(manifest["state"], tensors)
        except (OSError, ValueError, KeyError) as error:
            with suppress(OSError):
                path.unlink()
            if not isinstance(error, FileNotFoundError):
                self._warn(f"Damaged files in {self.folder} are removed ({error}); what they held is read again.")
            return None

    def _cut(self, key: Key, state: State) -> Iterator[Job]:
        """The pieces of a checkpoint that are not on the disk yet, and its manifest."""
        packing, mtp = state.chains[0].packing, bool(state.mtp)
        ((_, name),) = self._names(key, [len(key)], packing, mtp=mtp)
        path = self.folder / name
        token_bytes = sum(part.nbytes // part.shape[-2] for part in row_tensors(state, 0, len(key)).values())
        if path.exists() or token_bytes * len(key) + state.linear_nbytes > self.most_bytes:
            return
        block = max(1, (PIECE_BYTES - _HEADER_BYTES) // max(1, token_bytes))
        held = _whole_blocks(self._stored(key, packing, mtp=mtp), block)
        for start in range(len(held) * block, len(key), block):
            yield piece_of(row_tensors(state, start, min(start + block, len(key))))
        waiting: dict[str, mx.array] = {}
        for part, tensor in fixed_tensors(state).items():
            if waiting and sum(each.nbytes for each in waiting.values()) + tensor.nbytes > PIECE_BYTES - _HEADER_BYTES:
                yield piece_of(waiting)
                waiting = {}
            waiting[part] = tensor
        yield piece_of(waiting)
        yield Manifest(path, {"name": name, "state": described(state), "block": block}, held)


_open: "WeakSet[PrefixFiles]" = WeakSet()


@atexit.register
def flush_all() -> None:
    """Wait until all folders of this process hold what they were given, as is done when it ends."""
    with suppress(KeyboardInterrupt):
        for files in list(_open):
            files.flush(_PATIENCE)


def _lent(state: State) -> State:
    chains, mtp = (tuple(chain.lent() for chain in held) for held in (state.chains, state.mtp))
    return replace(state, chains=chains, mtp=mtp)


def _begins(key: Key, longer: Key) -> bool:
    return len(key) <= len(longer) and np.array_equal(np.asarray(key), np.asarray(longer[: len(key)]))


def _whole_blocks(stored: list[tuple[int, Path]], block: int) -> list[str]:
    """The pieces of whole blocks of tokens that the longest of the manifests lists."""
    for length, path in reversed(stored):
        with suppress(OSError, ValueError, KeyError):
            manifest = read_manifest(path)
            if manifest["block"] == block:
                # The MTP layer's last token is not in it yet.
                whole: list[str] = manifest["pieces"][: (length - 1) // block]
                return whole
    return []
