"""One engine a model: sequences come and go, and share its forward passes while they are there."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from time import perf_counter
from weakref import ref

import mlx.core as mx

from mlx_qwen.engine.caching import note_tokens
from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.guessing import Guessers
from mlx_qwen.engine.memory import MemoryPlan, machine_bytes
from mlx_qwen.engine.mending import begin_again
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.prefix_store import PrefixStore
from mlx_qwen.engine.sequence import Emission, Sequence
from mlx_qwen.engine.settling import Settling
from mlx_qwen.engine.step import Batch, read_piece
from mlx_qwen.engine.thread import wake
from mlx_qwen.engine.wired import WiredMemory
from mlx_qwen.model import Model
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import StateKind, empty_state

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
        self._lock = Lock()
        self._coming: deque[Sequence] = deque()
        self._waiting: deque[Sequence] = deque()
        self._reading: deque[Sequence] = deque()
        self._writing: list[Sequence] = []
        self._batch: Batch | None = None
        self._wired = WiredMemory()
        self._settling = Settling(model)
        self._steps = 0

    @property
    def prefixes(self) -> PrefixIndex | None:
        """What was read before and is held in memory; None where nothing is."""
        return self.store.index

    def submit(self, sequence: Sequence) -> None:
        """Let an answer be written; its tokens come in `sequence.unread`."""
        with self._lock:
            self._coming.append(sequence)
        wake(self)

    def cancel(self, sequence: Sequence) -> None:
        """Stop an answer: within one piece of its prompt or one token, its memory is free."""
        sequence.cancelled = True
        wake(self)

    def go_on(self) -> None:
        """Look again at what there is to do: a reader has taken some of its tokens."""
        wake(self)

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

    def step(self) -> bool:
        """Do a piece of each kind of work there is; whether there is more. Only in the computing thread.

        Whatever goes wrong ends the answers that it was done for: nobody waits for one that does not come.
        """
        outgoing: list[tuple[Sequence, Emission | BaseException | None]] = []
        try:
            self._work(outgoing)
        except BaseException as error:
            outgoing += [(one, error) for one in self._let_go()]
        for sequence, item in outgoing:
            sequence.deliver(item)
            if not isinstance(item, Emission) or item.finish_reason is not None:
                sequence.ended.set()
            if isinstance(item, Emission) and item.finish_reason is not None:
                sequence.deliver(None)
        active = bool(self._reading or self._writing or self._waiting)
        if not active:
            # What it finds out makes answers quicker, no more.
            with suppress(Exception):
                self._settling.settle()
        can_begin = bool(self._waiting) and not self._writing
        goes_on = can_begin or bool(self._reading) or any(not row.waits_for_reader for row in self._writing)
        return self._write_on(idle=not active) or goes_on

    def _write_on(self, *, idle: bool) -> bool:
        """Hand a piece of what was read to the disk, now and then or when there is nothing else to do."""
        with suppress(Exception):
            if idle or self._steps % _STEPS_BETWEEN_PIECES == 0:
                return self.store.advance() and idle
        return False

    def _work(self, outgoing: list[tuple[Sequence, Emission | BaseException | None]]) -> None:
        self._take()
        self._drop_cancelled()
        self._admit(outgoing)
        if self._reading or self._writing:
            self._wired.raise_limit()
        self._read(outgoing)
        self._write(outgoing)
        active = bool(self._reading or self._writing or self._waiting)
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_CLEARING == 0:
            mx.clear_cache()
        if not active:
            self._wired.restore()

    def _let_go(self) -> list[Sequence]:
        """Every answer that is not at its end, which nothing more is done for."""
        held = [*self._reading, *self._writing, *self._waiting]
        self._batch = None
        for sequence in held:
            sequence.failed = True
        for queue in (self._reading, self._writing, self._waiting):
            queue.clear()
        return [one for one in held if one.finish_reason is None]

    def _take(self) -> None:
        with self._lock:
            self._waiting += self._coming
            self._coming.clear()

    def _drop_cancelled(self) -> None:
        for queue in (self._waiting, self._reading):
            for sequence in [one for one in queue if one.cancelled]:
                queue.remove(sequence)
                sequence.ended.set()
        if any(row.cancelled for row in self._writing):
            self._dissolve()
            for row in self._writing:
                if row.cancelled:
                    _note_state(row)
                    row.ended.set()
            self._writing = [row for row in self._writing if not row.cancelled]

    def _admit(self, outgoing: list[tuple[Sequence, Emission | BaseException | None]]) -> None:
        """Begin as many of the waiting sequences as there is room for, in their order, and always one."""
        while self._waiting:
            held = [*self._reading, *self._writing]
            room = self.memory.state_bytes - sum(self.memory.needs(one) for one in (*held, self._waiting[0]))
            if held and (len(held) >= self.limits.most_rows or room < 0):
                return
            sequence = self._waiting.popleft()
            try:
                self._begin(sequence)
                self.store.shed(room, self._chains(sequence))
            except BaseException as error:
                sequence.failed = True
                outgoing.append((sequence, error))
            else:
                self._reading.append(sequence)

    def _chains(self, coming: Sequence) -> list[Chain]:
        """The keys and values of all that is being read and written."""
        states = [one.state for one in (coming, *self._reading, *self._writing)]
        states += [] if self._batch is None else [self._batch.state]
        return [chain for state in states if state is not None for chain in (*state.chains, *state.mtp)]

    def _begin(self, sequence: Sequence) -> None:
        """Find what was read already."""
        text, mtp = self.model.config.text, self.model.mtp is not None
        cache = sequence.prompt_cache
        if cache is not None:
            fresh = cache.state
            if not fresh.offset and not fresh.mtp:
                fresh = empty_state(text, fresh.kind.packing, mtp=mtp)
            sequence.state, sequence.cached = fresh, fresh.offset
            note_tokens(cache, sequence.to_read)
            return
        kind = StateKind(kv_packing(text, sequence.kv_bits), mtp)
        found = self.store.find(sequence, kind)
        if found is not None:
            sequence.state, sequence.read, sequence.cached = found.state, found.length, found.length
        else:
            sequence.state = empty_state(text, kind.packing, mtp=kind.mtp)
        if sequence.find_anchors is not None:
            sequence.anchors = sequence.find_anchors(sequence.read)

    def _read(self, outgoing: list[tuple[Sequence, Emission | BaseException | None]]) -> None:
        """Read a piece of the first prompt, which then stands behind the others."""
        if not self._reading:
            return
        sequence = self._reading[0]
        try:
            if sequence.progress is not None and sequence.pieces == 0:
                sequence.progress(sequence.read, len(sequence.to_read))
            end = sequence.cut(self.memory.piece(sequence))
            read_piece(self.model, sequence, end)
            self._guessers.costs.interrupted()
            if sequence.draft_model is not None:
                sequence.draft_model.read(sequence, end)
            sequence.pieces += 1
            _note_state(sequence)
            mx.clear_cache()
            if sequence.progress is not None:
                sequence.progress(end, len(sequence.to_read))
        except BaseException as error:
            if self._begins_again(error):
                return
            self._reading.popleft()
            sequence.failed = True
            outgoing.append((sequence, error))
            return
        if end in sequence.anchors or end == len(sequence.ids):
            self.store.keep_prompt(sequence, end)
        self._reading.rotate(-1)
        if end == len(sequence.to_read):
            self._reading.remove(sequence)
            self._dissolve()
            self._writing.append(sequence)

    def _write(self, outgoing: list[tuple[Sequence, Emission | BaseException | None]]) -> None:
        """Write a token, or a verified run of tokens, of every answer whose reader keeps up."""
        rows = [row for row in self._writing if not row.waits_for_reader]
        if not rows:
            return
        if self._batch is None or self._batch.rows != rows:
            self._dissolve()
            self._batch = Batch(self.model, rows)
        try:
            emitted = self._pass(self._batch)
        except BaseException as error:
            if self._begins_again(error):
                return
            self._batch = None
            self._writing = [row for row in self._writing if row not in rows]
            for row in rows:
                row.failed = True
                outgoing.append((row, error))
            return
        outgoing += emitted
        for row, emission in emitted:
            if row.prompt_cache is not None:
                row.prompt_cache.tokens.append(emission.token)
        for row in rows:
            _note_state(row)
        finished = [row for row in rows if row.finish_reason is not None]
        broken = [row for row in rows if row.finish_reason is None and row.rules.failure is not None]
        for row in finished:
            if row.draft_model is not None:
                row.draft_model.remember(row)
            self.store.keep_answer(row)
            self._settling.saw(row)
        for row in broken:
            row.failed = True
            outgoing.append((row, row.rules.failure))
        if finished or broken:
            self._dissolve()
            self._writing = [row for row in self._writing if row not in finished and row not in broken]

    def _pass(self, batch: Batch) -> list[tuple[Sequence, Emission]]:
        started = perf_counter()
        guessing = self._guessers.planned(batch.state, batch.rows)
        emitted = batch.verify(guessing) if guessing.depth else batch.decode()
        self._guessers.costs.saw(len(batch.rows), guessing.name, guessing.depth, perf_counter() - started)
        return emitted

    def _begins_again(self, error: BaseException) -> bool:
        """Read everything anew, if a kernel of ours failed that can be left out; whether it was so."""
        active = [*self._reading, *self._writing]
        if not begin_again(self.model, active, error):
            return False
        self._batch = None
        self.store.clear()
        self._waiting.extendleft(reversed(active))
        self._reading.clear()
        self._writing.clear()
        return True

    def _dissolve(self) -> None:
        """Give the rows of the batch their own states again, so that another one can be made."""
        if self._batch is not None:
            self._batch.released()
            self._batch = None


def _note_state(row: Sequence) -> None:
    """Keep the caller's own cache up to date; other threads can only use what is computed or being so."""
    if row.prompt_cache is not None and row.state is not None:
        mx.async_eval(row.state.arrays())
        row.prompt_cache.state = row.state


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
