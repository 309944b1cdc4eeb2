"""Rank 0: tells the others of requests and turns, and ends all where one has gone or does something else."""

import socket
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from functools import partial
from queue import SimpleQueue
from threading import Event, Lock, Thread, Timer
from typing import NoReturn

from mlx_qwen.distributed.ending import end, sentence
from mlx_qwen.distributed.frames import Frame
from mlx_qwen.distributed.link import BEAT, Link
from mlx_qwen.distributed.neighbours import GRACE
from mlx_qwen.distributed.pace import Pace, Record, Step, Work
from mlx_qwen.distributed.wire import check_request, request_frame, turn_frame
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.turn import Turn
from mlx_qwen.errors import MLXQwenError, PromptError, RanksEndedError

# Seconds for a link to say that another rank has gone, which made this one fail: Metal gives up waiting after some 5.
_HEARING = 4.0
# Seconds for the others to end by themselves, and for words to reach one that may stand still.
_PARTING, _LAST_WORDS = 5.0, 0.5
# Seconds for readers of answers to take the error, at most, and then for it to be written to whom they answer.
_TAKING, _WRITING = 2.0, 0.3


class Leader:
    """The other ranks, as rank 0 sees them; also what its engine tells them (`mlx_qwen.engine.turn.Ranks`).

    Args:
        connections: to each of them, by its number.
        names: what each rank, this one too, is called in messages.
    """

    def __init__(self, connections: Mapping[int, socket.socket], names: Mapping[int, str]) -> None:
        self._inbox: SimpleQueue[tuple[int, Frame]] = SimpleQueue()
        self._pace, self._record = Pace(1 + len(connections)), Record()
        self._lock, self._ending = Lock(), Lock()
        self._asked: dict[int, tuple[Sequence, set[int]]] = {}
        self._unfinished: list[Sequence] = []
        self._engine: Engine | None = None
        self._over = Event()
        self._names = names
        self._links = {
            rank: Link(connection, names[rank], partial(self.heard, rank), self.fail)
            for rank, connection in connections.items()
        }

    def lead(self, engine: Engine) -> None:
        """Let the engine's turns be taken by all from now on."""
        self._engine = engine
        engine.lead(self)
        Thread(target=self._watch, name="mlx-qwen ranks", daemon=True).start()

    def tell(self, frame: Frame) -> None:
        """Send a frame to all."""
        for link in self._links.values():
            link.send(frame)

    def heard(self, rank: int, frame: Frame) -> None:
        """Take a frame of a rank; called in the thread of its link."""
        if frame.kind == "failed":
            self.fail(f"{self._links[rank].other} cannot go on: {frame.values['reason']}")
        elif frame.kind == "lost":
            self.lost(rank, frame.values["rank"])
        elif frame.kind == "took":
            self._pace.took(rank, Step(**frame.values))
        elif frame.kind == "ready":
            self._ready(rank, frame.values["number"], frame.values.get("reason"))
        else:
            self._inbox.put((rank, frame))

    def lost(self, one: int, other: int) -> None:
        """Note that rank `one` hears nothing from its neighbour `other`: ends all, unless a rank's own end says why."""
        reason = f"the connection between {self._names[one]} and {self._names[other]} is dead: nothing comes over it"
        ending = Timer(GRACE, self.fail, [reason])
        ending.daemon = True
        ending.start()

    def answers(self, kind: str) -> dict[int, Frame]:
        """The next frame of each rank, all of one kind; waits for as long as they live."""
        found: dict[int, Frame] = {}
        while len(found) < len(self._links):
            rank, frame = self._inbox.get()
            if frame.kind != kind:
                raise MLXQwenError(f"{self._links[rank].other} sent {frame.kind!r}, expected {kind!r}.")
            found[rank] = frame
        return found

    def check(self, sequence: Sequence) -> None:
        """See `Ranks.check`."""
        if self._engine is not None and not self._engine.model.identity:
            raise PromptError(
                "Weights were changed on rank 0 alone. Change the checkpoint on all ranks and start again."
            )
        check_request(sequence)

    def announce(self, sequence: Sequence) -> None:
        """See `Ranks.announce`."""
        frame = request_frame(sequence)
        sequence.progress = _never_failing(sequence)
        with self._lock:
            if self._over.is_set():
                raise RanksEndedError("The other ranks have ended; start all again.")
            self._asked[sequence.number] = (sequence, set())
            self._unfinished = [one for one in self._unfinished if not one.ended.is_set()] + [sequence]
        self.tell(frame)

    def send(self, turn: Turn) -> None:
        """See `Ranks.send`."""
        self._pace.began()
        self.tell(turn_frame(turn))

    def computing(self, tokens: int, *, is_prompt: bool, foreseen: bool = True) -> None:
        """See `Ranks.computing`."""
        self._pace.began(Work(is_prompt, max(tokens, 1), foreseen))

    def computed(self) -> None:
        """See `Ranks.computed`."""
        self._pace.ended()

    def took(self, outgoing: Listed[tuple[Sequence, Emission | BaseException | None]]) -> None:
        """See `Ranks.took`."""
        assert self._engine is not None, "an engine is led before it takes turns"
        step = self._record.step(outgoing, self._engine.model.mtp_reads)
        self._pace.took(0, step)
        if step.failure:
            # Another rank may have gone, which its link is about to say; then this never returns.
            time.sleep(_HEARING)
            self.fail(f"rank 0 failed: {step.failure}")

    def close(self, reason: str = "") -> None:
        """Let all others end: well, or quietly with a failure where there is a reason."""
        if not self._over.is_set():
            self._end_others(reason, quiet=True, patience=_PARTING)

    def fail(self, reason: str) -> NoReturn:
        """End all ranks with an error, this process at once."""
        with self._ending:
            if not self._over.is_set():
                said = sentence(reason)
                self._end_others(said, quiet=False, patience=_LAST_WORDS)
                self._end_answers(said)
                end(said)
        while True:  # this process is ending already
            time.sleep(1)

    def _end_answers(self, said: str) -> None:
        """Let all who wait for answers know why these end here, and have a moment to pass it on."""
        with self._lock:
            waited_for = [one for one in self._unfinished if not one.ended.is_set() and not one.cancelled]
        for sequence in waited_for:
            sequence.failed = True
            sequence.deliver(RanksEndedError(said))
        until = time.monotonic() + _TAKING
        while any(not one.unread.empty() for one in waited_for) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(_WRITING if waited_for else 0)

    def _end_others(self, reason: str, *, quiet: bool, patience: float) -> None:
        self._over.set()
        self.tell(Frame("end", {"reason": reason, "quiet": quiet}))
        for link in self._links.values():
            link.close(patience)

    def _ready(self, rank: int, number: int, reason: str | None) -> None:
        """Note that a rank is ready for an answer, or why it never will be, which ends that answer alone."""
        assert self._engine is not None, "requests come from an engine that is led"
        with self._lock:
            asked = self._asked.get(number)
            if asked is None:
                return
            sequence, ready = asked
            ready.add(rank)
            if reason is None and len(ready) < len(self._links):
                return
            del self._asked[number]
        if reason is None:
            self._engine.arrive(sequence)
            return
        self.tell(Frame("forget", {"number": number}))
        sequence.failed = True
        sequence.deliver(PromptError(f"{self._links[rank].other} cannot take this request: {reason}"))
        sequence.ended.set()

    def _watch(self) -> None:
        while not self._over.wait(BEAT):
            if (reason := self._pace.trouble()) is not None:
                self.fail(reason)


def _never_failing(sequence: Sequence) -> Callable[[int, int], None] | None:
    """The sequence's progress; where it fails the answer is cancelled, as all ranks can do and no rank alone."""
    progress = sequence.progress
    if progress is None:
        return None

    def show(done: int, total: int) -> None:
        try:
            progress(done, total)
        except Exception:
            sequence.cancelled = True

    return show
