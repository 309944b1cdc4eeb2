"""How ranks begin: they come together, compare what they are, load their shares, and agree on what each may use."""

import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import mlx.core as mx

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.demo import demo_folder
from mlx_qwen.distributed.ending import end, keep_terminal
from mlx_qwen.distributed.environment import JOINING, joined, within
from mlx_qwen.distributed.follower import Follower
from mlx_qwen.distributed.frames import Frame, packed, received
from mlx_qwen.distributed.leader import Leader
from mlx_qwen.distributed.means import Means, agree, agreed, means_of
from mlx_qwen.distributed.meeting import Note, accepted, listening, reached, told
from mlx_qwen.distributed.neighbours import watch
from mlx_qwen.distributed.sameness import check_files, check_versions, files, host, versions
from mlx_qwen.engine.engine import Engine, engine_of
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor

# Seconds for ranks that are told to end, as nobody waits for anything else.
_DISMISSING = 10.0


class Wanted(NamedTuple):
    """What rank 0 lets all ranks load; the fields are arguments of `load`."""

    path: str | None
    revision: str | None = None
    dtype: mx.Dtype | None = None
    tune: bool = True
    pipeline: bool = False

    def told(self) -> dict[str, str | bool | None]:
        """As JSON values."""
        return {**self._asdict(), "dtype": None if self.dtype is None else str(self.dtype).rpartition(".")[2]}

    @classmethod
    def heard(cls, values: Mapping[str, Any]) -> "Wanted":
        """What was told."""
        found = cls(**{name: values[name] for name in cls._fields})
        return found if found.dtype is None else found._replace(dtype=getattr(mx, values["dtype"]))

    def folder(self) -> Path:
        """Where it lies on this rank."""
        return resolve(demo_folder() if self.path is None else self.path, revision=self.revision)

    def load(self, folder: Path, group: mx.distributed.Group) -> tuple[Model, Processor]:
        """This rank's share of it."""
        return load(folder, dtype=self.dtype, tune=self.tune, group=group, pipeline=self.pipeline)


class Led(NamedTuple):
    """What rank 0 has: its share of the model, its processor, and the other ranks, which wait for its engine."""

    model: Model
    processor: Processor
    leader: Leader


def lead(wanted: Wanted, group: mx.distributed.Group | None = None) -> Led:
    """Load a model on all ranks, as rank 0 of a group, or of all that were started with this process.

    Raises MLXQwenError, and ends all other ranks with it, where they differ or one of them cannot load its share.
    """
    keep_terminal()
    group = joined() if group is None else group
    listener, notes = _met(group)
    connections, names = _gathered(listener, notes[0], group.size())
    leader = Leader(connections, names)
    try:
        hosts = [names[rank] for rank in range(group.size())]
        leader.tell(Frame("load", {**wanted.told(), "names": hosts}))
        watch(0, notes, listener, names, partial(leader.lost, 0))
        folder = wanted.folder()
        here, where = files(folder), str(folder)
        for rank, frame in sorted(leader.answers("holds").items()):
            check_files(rank, here, frame.values["files"], where, frame.values["folder"], frame.values["host"])
        leader.tell(Frame("read", {}))
        model, processor = wanted.load(folder, group)
        engine = engine_of(model)
        others = [Means(**frame.values) for frame in leader.answers("loaded").values()]
        means = agreed([means_of(engine), *others])
        known = {"reads": model.mtp_reads, "unsettled": model.mtp_unsettled}
        leader.tell(Frame("begin", {"means": means._asdict(), **known}))
        agree(engine, means)
        leader.lead(engine)
    except BaseException as error:
        leader.close(str(error) or type(error).__name__)
        raise
    return Led(model, processor, leader)


def follow(group: mx.distributed.Group | None = None) -> NoReturn:
    """Be a rank above 0 until rank 0 ends; `group` as in `lead`."""
    # Ctrl-C is for rank 0, which stops an answer or ends all. Beside the main thread it goes to none.
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        group = joined() if group is None else group
        listener, notes = _met(group)
        connection = reached(notes[0])
    except MLXQwenError as error:
        end(str(error))
    hello = Frame("hello", {"rank": group.rank(), "host": host(), "versions": versions()})
    connection.sendall(b"".join(packed(hello)))
    follower = Follower(connection)
    try:
        with _told_of_failures(follower):
            asked = follower.expect("load").values
            watch(group.rank(), notes, listener, dict(enumerate(asked["names"])), follower.lost)
            engine, processor = _loaded(follower, group, asked)
            follower.follow(engine, processor)
    finally:
        end("This rank ended without a word from rank 0.")


def dismiss(reason: str) -> None:
    """As rank 0, let the other ranks end quietly, which wait to be told what to load, if they are there."""
    with suppress(MLXQwenError, OSError):
        group = joined(_DISMISSING)
        with within(_DISMISSING, lambda: end(reason, quiet=True)):
            listener, notes = _met(group)
            connections, _ = _gathered(listener, notes[0], group.size())
            _let_end(connections, reason, quiet=True)


def _met(group: mx.distributed.Group) -> tuple[socket.socket, list[Note]]:
    """Where this rank listens, and the notes of all."""
    listener, note = listening(group.rank())
    with within(JOINING, lambda: end("A rank ended before all were connected.")):
        return listener, told(group, note)


def _loaded(follower: Follower, group: mx.distributed.Group, asked: Mapping[str, Any]) -> tuple[Engine, Processor]:
    wanted = Wanted.heard(asked)
    folder = wanted.folder()
    follower.say("holds", files=files(folder), folder=str(folder), host=host())
    follower.expect("read")
    model, processor = wanted.load(folder, group)
    engine = engine_of(model)
    follower.say("loaded", **means_of(engine)._asdict())
    begin = follower.expect("begin").values
    model.mtp_reads, model.mtp_unsettled = begin["reads"], begin["unsettled"]
    agree(engine, Means(**begin["means"]))
    return engine, processor


@contextmanager
def _told_of_failures(follower: Follower) -> Iterator[None]:
    """What goes wrong here is told to rank 0, and ends all."""
    try:
        yield
    except MLXQwenError as error:
        follower.fail(str(error))
    except Exception as error:
        follower.fail(f"{type(error).__name__}: {error}")


def _gathered(listener: socket.socket, note: Note, size: int) -> tuple[dict[int, socket.socket], dict[int, str]]:
    """Connections to all other ranks, and all ranks' names; raises MLXQwenError for one that runs other versions."""
    connections: dict[int, socket.socket] = {}
    names = {0: f"rank 0 ({host()})"}
    until = time.monotonic() + JOINING
    try:
        while len(connections) < size - 1:
            connection = accepted(listener, note, until)
            hello = None if connection is None else received(connection)
            if connection is None or hello is None:
                missing = ", ".join(f"rank {rank}" for rank in range(1, size) if rank not in connections)
                raise MLXQwenError(f"{missing} did not connect to rank 0 within {JOINING:.0f} s. Start all again.")
            rank, named = int(hello.values["rank"]), str(hello.values["host"])
            connections[rank], names[rank] = connection, f"rank {rank} ({named})"
            check_versions(rank, hello.values["versions"], named)
    except MLXQwenError as error:
        _let_end(connections, str(error), quiet=False)
        raise
    return connections, names


def _let_end(connections: Mapping[int, socket.socket], reason: str, *, quiet: bool) -> None:
    last = b"".join(packed(Frame("end", {"reason": reason, "quiet": quiet})))
    for connection in connections.values():
        connection.sendall(last)
