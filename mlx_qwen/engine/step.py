"""Forward passes: a piece of a prompt, a token for every row of a batch, or a verification of drafts."""

from collections.abc import Sequence as Listed

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.choice import Choice, tokens_of
from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.guessing import Guessing
from mlx_qwen.engine.sampling import History, Pick, choose_all, rows_at
from mlx_qwen.engine.sequence import Emission, Sequence, Unread
from mlx_qwen.engine.verified import Verified, choose_verified, constrain_verified, started
from mlx_qwen.media.grids import Kind
from mlx_qwen.model import Model
from mlx_qwen.model.multimodal import Pixels
from mlx_qwen.model.state import State


def read_piece(model: Model, sequence: Sequence, end: int) -> None:
    """Read the prompt up to its token `end`; with the last one the first token of the answer is chosen."""
    state, ids = sequence.state, sequence.to_read
    assert state is not None, "a sequence has a state from its start"
    is_last = end == len(ids)
    if sequence.embedded is None and (pixels := _pixels_behind(sequence)):
        rest = mx.array([ids[sequence.read :]])
        sequence.embedded, sequence.embedded_from = model.embed(rest, pixels, state), sequence.read
    if end > sequence.read:
        part = None
        if sequence.embedded is not None:
            first = sequence.embedded_from
            part = sequence.embedded.part(sequence.read - first, end - first)
        tokens = mx.array([ids[sequence.read : end]])
        room = state.offset + len(ids) - sequence.read
        sequence.state = model.step(tokens, state, embedded=part, last=True, room=room).state
    logits = []
    if is_last:
        assert sequence.state is not None and sequence.state.last is not None, "a prompt has at least one token"
        logits = [model.logits(sequence.state.last)[:, -1]]
    mx.eval(logits, sequence.state.arrays() if sequence.state else [])
    sequence.read = end
    if is_last:
        sequence.embedded = None
        sequence.history = sequence.sampler.start()
        for token in sequence.written:
            sequence.history = sequence.sampler.saw(sequence.history, mx.array([token]))
        sequence.pending = sequence.choose(logits[0])
        mx.async_eval(started([sequence.pending]))


# How many tokens the MTP layer's keys and values, which none of them needs, may be behind while nobody drafts.
_MOST_UNFILLED = 32


class Batch:
    """Rows that share forward passes, each with a token chosen that is not read yet.

    A pass over the unread tokens is started before the host knows them, so that the device never waits for Python.
    """

    def __init__(self, model: Model, rows: Listed[Sequence]) -> None:
        self._model = model
        self.rows = list(rows)
        self.state = State.joined([row.state for row in rows if row.state is not None])
        self._decoded = 0

    def decode(self) -> list[tuple[Sequence, Emission]]:
        """Write the pending token of every row, and choose the next ones."""
        goes_on = any(not row.at_last_token for row in self.rows)
        pending = [_pending(row) for row in self.rows]
        following: dict[int, Choice] = {}
        waiting: list[int] = []
        logits = None
        if goes_on:
            tokens = tokens_of(pending)
            hidden, self.state, _ = self._model.step(tokens[:, None], self.state)
            logits = self._model.logits(hidden)[:, -1]
            self._see(tokens)
            waiting = [i for i, row in enumerate(self.rows) if row.is_one_by_one]
            following = self._choices(logits, [i for i, row in enumerate(self.rows) if not row.is_one_by_one])
            self._decoded += 1
            fills = self.state.mtp if self._decoded % _MOST_UNFILLED == 0 else ()
            asked = [logits] if waiting else []
            mx.async_eval(asked, started(following.values()), *(chain.buffers() for chain in fills))
        emitted = [
            (row, row.emit(choice.known(), choice, from_draft=False))
            for row, choice in zip(self.rows, pending, strict=True)
        ]
        for i, choice in following.items():
            if self.rows[i].finish_reason is None:
                self.rows[i].pending = self.rows[i].replaced(choice)
        if logits is not None:
            going = [i for i in waiting if self.rows[i].finish_reason is None]
            for i, choice in self._choices(logits, going, constrained=True).items():
                self.rows[i].pending = self.rows[i].replaced(choice)
            self._hand_back()
        return emitted

    def verify(self, guessing: Guessing) -> list[tuple[Sequence, Emission]]:
        """As `decode`, with more tokens of each row, where what is guessed of it is what it would have chosen."""
        rows = self.rows
        assert 0 < guessing.depth <= MOST_DRAFTS, "a batch without drafts decodes"
        pending = [_pending(row) for row in rows]
        tokens = tokens_of(pending)
        self._see(tokens)
        guesses = guessing.guesses(Unread(self.state, rows, tokens))
        ids = mx.concatenate([tokens[:, None], guesses.astype(tokens.dtype)], axis=1)
        hidden, _, tape = self._model.step(ids, self.state, tape=True)
        assert tape is not None, "a tape was asked for"
        logits = self._model.logits(hidden)
        answers = [Verified(row, ids[i], logits[i], guessing.depths[i]) for i, row in enumerate(rows)]
        choose_verified(answers, logits)
        mx.async_eval(ids, [started(answer.choices) for answer in answers], logits)
        proposed: list[list[int]] = np.array(ids).tolist()
        constrain_verified(answers, logits, proposed)
        emitted, kept = [], []
        for row, choice, answer, mine in zip(rows, pending, answers, proposed, strict=True):
            written = answer.settle(choice, mine)
            kept.append(len(written))
            emitted += [(row, emission) for emission in written]
        self.state = tape.keep(kept)
        guessing.settled([count - 1 for count in kept])
        self._hand_back()
        return emitted

    def _see(self, tokens: mx.array) -> None:
        """Let the histories of all rows include `tokens` [B]."""
        for i, row in enumerate(self.rows):
            row.history = row.sampler.saw(_history(row), tokens, i)

    def _choices(self, logits: mx.array, members: Listed[int], *, constrained: bool = False) -> dict[int, Choice]:
        """The next token of the rows with these numbers, from `logits` [B, V] of all, as their rules allow."""
        if not members:
            return {}
        rows = [self.rows[i] for i in members]
        picks = [Pick(row.sampler, _history(row), row.rules.allowed() if constrained else None) for row in rows]
        return dict(zip(members, choose_all(rows_at(logits, members), picks), strict=True))

    def _hand_back(self) -> None:
        """Give rows that leave the state that has read their last token."""
        for i, row in enumerate(self.rows):
            row.state = self.state if len(self.rows) == 1 else None
            if len(self.rows) > 1 and row.finish_reason is not None:
                row.state = self.state.row(i)

    def released(self) -> None:
        """Give every row its own state, when the batch is made anew."""
        for i, row in enumerate(self.rows):
            row.state = self.state.row(i)


def _pixels_behind(sequence: Sequence) -> list[Pixels]:
    """The images, and the videos, of the prompt that are not read yet, each kind as one."""
    found = []
    for kind in (Kind.IMAGE, Kind.VIDEO):
        parts = [one.pixels for one in sequence.media if one.pixels.kind is kind and one.start >= sequence.read]
        if parts:
            values, grids = (
                mx.concatenate(list(part)) for part in zip(*((p.values, p.grid_thw) for p in parts), strict=True)
            )
            found.append(Pixels(kind, values, grids))
    return found


def _pending(row: Sequence) -> Choice:
    assert row.pending is not None, "a row in a batch has a token chosen"
    return row.pending


def _history(row: Sequence) -> History:
    assert row.history is not None, "the prompt has been read"
    return row.history
