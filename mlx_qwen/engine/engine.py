"""One engine a model: sequences come and go, and share its forward passes while they are there."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from weakref import ref

import mlx.core as mx

from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.guessing import Guessers
from mlx_qwen.engine.memory import MemoryPlan
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.prefix_store import PrefixStore
from mlx_qwen.engine.scheduler import Scheduler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.settling import Settling
from mlx_qwen.engine.thread import wake
from mlx_qwen.engine.turn import Outgoing, Ranks, Turn
from mlx_qwen.engine.wired import WiredMemory
from mlx_qwen.machine import machine_bytes
from mlx_qwen.model import Model

_STEPS_BETWEEN_CLEARING = 256
# How often a piece of what was read is handed to the disk while answers are being written.
_STEPS_BETWEEN_PIECES = 16
# Seconds to wait for an answer that was cancelled to be let go.
_PATIENCE = 60.0
_making = Lock()


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine may use.

    Attributes:
        most_rows: answers that are written at the same time; others wait.
        state_bytes: what the states of answers that are being written may take by the end; others wait. None for what
            the machine has beside the weights.
        piece_bytes: what may be alive while a piece of a prompt is read, which is shortened for that; None as above.
    """

    most_rows: int = 16
    state_bytes: int | None = None
    piece_bytes: int | None = None


class Engine:
    """Reads prompts in pieces and writes answers in batches, in the one thread that computes.

    `submit`, `cancel` and `stream` may be called from any thread. Every answer is what its sequence gives alone.
    """

    def __init__(self, model: Model, limits: Limits | None = None, *, prefixes: PrefixIndex | None = None) -> None:
        self.model = model
        self.limits = limits = limits or Limits()
        self.memory = MemoryPlan(model, limits.state_bytes, limits.piece_bytes)
        self.store = PrefixStore(model, prefixes, _waker(ref(self)))
        self.draft_model: tuple[object, DraftModel] | None = None
        self._guessers = Guessers(model)
        self._scheduler = Scheduler(model, self.memory, self.store, self._guessers)
        self._lock = Lock()
        self._coming: deque[Sequence] = deque()
        self._wired = WiredMemory()
        self._settling = Settling(model)
        self._steps = 0
        self._ranks: Ranks | None = None
        self._ahead: Turn | None = None
        self._woken: Callable[[], None] | None = None

    @property
    def prefixes(self) -> PrefixIndex | None:
        """What was read before and is held in memory; None where nothing is."""
        return self.store.index

    def check(self, sequence: Sequence) -> None:
        """Raises PromptError for an answer that can never be written here."""
        self.memory.check(sequence)
        if self._ranks is not None:
            self._ranks.check(sequence)

    def submit(self, sequence: Sequence) -> None:
        """Let an answer be written; its tokens come in `sequence.unread`."""
        if self._ranks is None:
            self.arrive(sequence)
        else:
            self._ranks.announce(sequence)

    def arrive(self, sequence: Sequence) -> None:
        """Let an answer be written that all ranks are ready for."""
        with self._lock:
            self._coming.append(sequence)
        wake(self)

    def cancel(self, sequence: Sequence) -> None:
        """Stop an answer: within one piece of its prompt or one token, its memory is free."""
        sequence.cancelled = True
        wake(self)

    def go_on(self) -> None:
        """Look again at what there is to do: a reader has taken some of its tokens, or a folder a piece."""
        if self._woken is None:
            wake(self)
        else:
            self._woken()

    def stream(self, sequence: Sequence) -> Iterator[Emission]:
        """The tokens of a submitted sequence as they come; closing the iterator cancels it.

        Raises whatever ended it before its end, such as MLXQwenError when the logits are not numbers.
        """
        try:
            while (item := sequence.unread.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                was_full = sequence.waits_for_reader
                yield item
                if was_full or sequence.unread.empty():
                    self.go_on()
        finally:
            if sequence.finish_reason is None and not sequence.failed:
                self.cancel(sequence)
                if sequence.prompt_cache is not None:
                    # Until then its arrays are the computing thread's.
                    sequence.ended.wait(_PATIENCE)

    def lead(self, ranks: Ranks) -> None:
        """Let others take every turn of this engine, from the first one on."""
        self._ranks, self._scheduler.ranks, self._scheduler.mends = ranks, ranks, False
        self.model.led = True

    def be_led(self, woken: Callable[[], None]) -> None:
        """Take the turns of another process's engine alone; `woken` is called, from any thread, to `write_on`."""
        self._scheduler.mends, self._woken = False, woken

    def follow(self, turn: Turn) -> Outgoing:
        """Take a turn of another process's engine; what its readers get. Only in the one thread that computes."""
        outgoing = self._take(turn)
        self._settle()
        if self.write_on():
            self.go_on()
        return outgoing

    def step(self) -> bool:
        """Do a piece of each kind of work there is; whether there is more. Only in the computing thread.

        Whatever goes wrong ends the answers that it was done for: nobody waits for one that does not come.
        """
        outgoing = self._take(self._next_turn())
        if self._ranks is not None:
            self._ranks.took(outgoing)
        for sequence, item in outgoing:
            sequence.deliver(item)
            if not isinstance(item, Emission) or item.finish_reason is not None:
                sequence.ended.set()
            if isinstance(item, Emission) and item.finish_reason is not None:
                sequence.deliver(None)
        self._settle()
        goes_on = self._scheduler.goes_on or self._ahead is not None
        return self.write_on() or goes_on

    def _next_turn(self) -> Turn:
        """The turn to take now. Where others take it too, it was told them while the one before was being taken.

        They take all that they are told of: nothing is told ahead where nobody would wake this engine for it.
        """
        if self._ranks is None:
            return self._made_turn()
        turn = self._ahead or self._told_turn(self._ranks)
        goes_on = turn.tells or self._scheduler.goes_on
        self._ahead = self._told_turn(self._ranks) if goes_on else None
        return turn

    def _told_turn(self, ranks: Ranks) -> Turn:
        turn = self._made_turn()
        ranks.send(turn)
        return turn

    def _made_turn(self) -> Turn:
        with self._lock:
            coming = tuple(self._coming)
            self._coming.clear()
        return self._scheduler.turn(coming, self.limits.most_rows)

    def _take(self, turn: Turn) -> Outgoing:
        scheduler, outgoing = self._scheduler, Outgoing()
        try:
            self._work(scheduler, turn, outgoing)
        except BaseException as error:
            outgoing += [(one, error) for one in scheduler.let_go()]
        return outgoing

    def _settle(self) -> None:
        if not self._scheduler.is_active:
            # What it finds out makes answers quicker, no more.
            with suppress(Exception):
                self._settling.settle()

    def write_on(self) -> bool:
        """Hand a piece of what was read to the disk, now and then or when there is nothing else to do.

        Returns whether there is more of it to be done now. Only in the computing thread.
        """
        idle = not self._scheduler.is_active
        with suppress(Exception):
            if idle or self._steps % _STEPS_BETWEEN_PIECES == 0:
                return self.store.advance() and idle
        return False

    def _work(self, scheduler: Scheduler, turn: Turn, outgoing: Outgoing) -> None:
        scheduler.begin(turn)
        scheduler.admit(turn.most_rows, outgoing)
        if scheduler.is_computing:
            self._wired.raise_limit()
        scheduler.read(outgoing)
        scheduler.write(outgoing, turn.behind)
        for row, item in outgoing:
            if isinstance(item, Emission) and item.finish_reason is not None:
                self._settling.saw(row)
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_CLEARING == 0:
            mx.clear_cache()
        if not scheduler.is_active:
            self._wired.restore()


def _waker(engine: "ref[Engine]") -> Callable[[], None]:
    """Wakes an engine that somebody else still holds."""

    def run() -> None:
        if (there := engine()) is not None:
            there.go_on()

    return run


def engine_of(model: Model) -> Engine:
    """The engine of a model: one for all that generate with it."""
    with _making:
        if model.engine is None:
            model.engine = Engine(model, prefixes=PrefixIndex(machine_bytes() // 8))
        assert isinstance(model.engine, Engine)
        return model.engine
