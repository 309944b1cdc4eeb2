"""Which sequences are read and written next: in a queue, in pieces, in batches."""

from collections import deque
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Listed
from time import perf_counter

import mlx.core as mx

from mlx_qwen.engine.caching import note_tokens
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.guessing import Guessers
from mlx_qwen.engine.memory import DRAFT_SHARE, MemoryPlan
from mlx_qwen.engine.mending import begin_again
from mlx_qwen.engine.prefix_store import PrefixStore
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.step import Batch, read_piece
from mlx_qwen.engine.turn import Outgoing, Passed, Ranks, Turn
from mlx_qwen.model import Model
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.chain import Chain
from mlx_qwen.model.state import StateKind, empty_state


class Scheduler:
    """Sequences on their way: they wait, then their prompts are read in turns, then all are written together.

    Everything here happens in the computing thread. With `mends`, answers are begun again where a kernel failed;
    without, other ranks take the same steps. `ranks` are told of what is computed, where this one leads them.
    """

    def __init__(self, model: Model, memory: MemoryPlan, store: PrefixStore, guessers: Guessers) -> None:
        self._model, self._memory, self._store, self._guessers = model, memory, store, guessers
        self._waiting: deque[Sequence] = deque()
        self._reading: deque[Sequence] = deque()
        self._writing: list[Sequence] = []
        self._batch: Batch | None = None
        self._passed: list[Passed] = []
        self.mends = True
        self.ranks: Ranks | None = None

    @property
    def is_active(self) -> bool:
        """Whether any answer is not at its end."""
        return bool(self._reading or self._writing or self._waiting)

    @property
    def is_computing(self) -> bool:
        """Whether any answer has begun."""
        return bool(self._reading or self._writing)

    @property
    def goes_on(self) -> bool:
        """Whether there is something to do before a reader or a new sequence comes."""
        can_begin = bool(self._waiting) and not self._writing
        return can_begin or bool(self._reading) or any(not row.waits_for_reader for row in self._writing)

    def turn(self, coming: Iterable[Sequence], most_rows: int) -> Turn:
        """The next turn, as things are now."""
        passed, self._passed = self._passed, []
        every = (*self._waiting, *self._reading, *self._writing)
        cancelled = frozenset(one.number for one in every if one.cancelled)
        behind = frozenset(row.number for row in self._writing if row.waits_for_reader)
        return Turn(tuple(coming), cancelled, behind, tuple(passed), most_rows)

    def begin(self, turn: Turn) -> None:
        """Put the sequences that come behind those that wait, and let go of those that are cancelled."""
        self._waiting += turn.coming
        for sequence in turn.coming:
            self._store.limit(sequence.prefix_bytes)
        for passed in turn.passed:
            if passed.rows:
                self._guessers.costs.saw(*passed)
            else:
                self._guessers.costs.interrupted()
        self.drop_cancelled(turn.cancelled)

    def let_go(self) -> list[Sequence]:
        """Every answer that is not at its end, which nothing more is done for."""
        held = [*self._reading, *self._writing, *self._waiting]
        self._batch = None
        for sequence in held:
            sequence.failed = True
            self._leave(sequence)
        for queue in (self._reading, self._writing, self._waiting):
            queue.clear()
        return [one for one in held if one.finish_reason is None]

    def drop_cancelled(self, cancelled: Collection[int]) -> None:
        for queue in (self._waiting, self._reading):
            for sequence in [one for one in queue if one.number in cancelled]:
                queue.remove(sequence)
                self._leave(sequence)
                sequence.ended.set()
        if any(row.number in cancelled for row in self._writing):
            self._dissolve()
            for row in self._writing:
                if row.number in cancelled:
                    _note_state(row)
                    self._leave(row)
                    row.ended.set()
            self._writing = [row for row in self._writing if row.number not in cancelled]

    def admit(self, most_rows: int, outgoing: Outgoing) -> None:
        """Begin as many of the waiting sequences as there is room for, in their order, and always one."""
        while self._waiting:
            held = [*self._reading, *self._writing]
            room = self._memory.state_bytes - sum(self._memory.needs(one) for one in (*held, self._waiting[0]))
            if held and (len(held) >= most_rows or room < 0):
                return
            sequence = self._waiting.popleft()
            try:
                self._begin(sequence)
                if sequence.draft_model is not None:
                    room -= sequence.draft_model.shed(room // DRAFT_SHARE)
                self._store.shed(room, self._chains(sequence))
            except BaseException as error:
                sequence.failed = True
                self._leave(sequence)
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
        text, mtp = self._model.config.text, self._model.mtp is not None
        cache = sequence.prompt_cache
        if cache is not None:
            fresh = cache.state
            if not fresh.offset and not fresh.mtp:
                fresh = empty_state(text, fresh.kind.packing, mtp=mtp)
            sequence.state, sequence.cached = fresh, fresh.offset
            note_tokens(cache, sequence.to_read)
            return
        kind = StateKind(kv_packing(text, sequence.kv_bits), mtp)
        found = self._store.find(sequence, kind)
        if found is not None:
            sequence.state, sequence.read, sequence.cached = found.state, found.length, found.length
        else:
            sequence.state = empty_state(text, kind.packing, mtp=kind.mtp)
        if sequence.find_anchors is not None:
            sequence.anchors = sequence.find_anchors(sequence.read)

    def read(self, outgoing: Outgoing) -> None:
        """Read a piece of the first prompt, which then stands behind the others."""
        if not self._reading:
            return
        sequence = self._reading[0]
        try:
            if sequence.progress is not None and sequence.pieces == 0:
                sequence.progress(sequence.read, len(sequence.to_read))
            end = sequence.cut(self._memory.piece(sequence))
            if self.ranks is not None:
                unseen = bool(sequence.media) and sequence.embedded is None
                self.ranks.computing(end - sequence.read, is_prompt=True, foreseen=not unseen)
            read_piece(self._model, sequence, end)
            self._passed.append(Passed())
            if sequence.draft_model is not None:
                sequence.draft_model.read(sequence, end)
            if self.ranks is not None:
                self.ranks.computed()
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
            self._leave(sequence)
            outgoing.append((sequence, error))
            return
        if end in sequence.anchors or end == len(sequence.ids):
            self._store.keep_prompt(sequence, end)
        self._reading.rotate(-1)
        if end == len(sequence.to_read):
            self._reading.remove(sequence)
            self._dissolve()
            self._writing.append(sequence)

    def write(self, outgoing: Outgoing, behind: Collection[int] = ()) -> None:
        """Write a token, or a verified run of tokens, of every answer whose reader keeps up."""
        rows = [row for row in self._writing if row.number not in behind]
        if not rows:
            return
        if self._batch is None or self._batch.rows != rows:
            self._dissolve()
            self._batch = Batch(self._model, rows)
        try:
            emitted = self._pass(self._batch)
        except BaseException as error:
            if self._begins_again(error):
                return
            self._batch = None
            self._writing = [row for row in self._writing if row not in rows]
            for row in rows:
                row.failed = True
                self._leave(row)
                outgoing.append((row, error))
            return
        outgoing += emitted
        for row, emission in emitted:
            if row.prompt_cache is not None:
                row.prompt_cache.tokens.append(emission.token)
        if any(row.fault is not None and self._begins_again(row.fault) for row in rows):
            return
        self._end(rows, outgoing)

    def _end(self, rows: Listed[Sequence], outgoing: Outgoing) -> None:
        """Let those of the rows leave that are at their end, or cannot go on."""
        finished = [row for row in rows if row.finish_reason is not None]
        broken = [row for row in rows if row.finish_reason is None and row.failure is not None]
        if finished or broken:
            self._dissolve()
            self._writing = [row for row in self._writing if row not in finished and row not in broken]
        for row in rows:
            _note_state(row)
        for row in finished:
            if row.draft_model is not None:
                row.draft_model.remember(row)
            self._store.keep_answer(row)
        for row in broken:
            row.failed = True
            outgoing.append((row, row.failure))
        self._leave(*finished, *broken)

    def _pass(self, batch: Batch) -> list[tuple[Sequence, Emission]]:
        started = perf_counter()
        guessing = self._guessers.planned(batch.state, batch.rows)
        if self.ranks is not None:
            self.ranks.computing(len(batch.rows) * (1 + guessing.depth), is_prompt=False)
        emitted = batch.verify(guessing) if guessing.depth else batch.decode()
        self._passed.append(Passed(len(batch.rows), guessing.name, guessing.depth, perf_counter() - started))
        if self.ranks is not None:
            self.ranks.computed()
        return emitted

    def _begins_again(self, error: BaseException) -> bool:
        """Read everything anew, if a kernel of ours failed that can be left out; whether it was so."""
        active = [*self._reading, *self._writing]
        if not self.mends or not begin_again(self._model, active, error):
            return False
        self._batch = None
        self._store.clear()
        self._waiting.extendleft(reversed(active))
        self._reading.clear()
        self._writing.clear()
        return True

    def _leave(self, *sequences: Sequence) -> None:
        """Drop what they hold at their end: ranks count prefixes alike, though only one has readers of the answers."""
        for sequence in () if self.mends else sequences:
            sequence.release()

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
