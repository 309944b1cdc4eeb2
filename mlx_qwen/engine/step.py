"""Forward passes: a piece of a prompt, a token for every row of a batch, or a verification of drafts."""

from collections.abc import Mapping
from collections.abc import Sequence as Listed

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.choice import Choice, tokens_of
from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.guessing import Guessing
from mlx_qwen.engine.sampling import History, Pick, choose_all, rows_at
from mlx_qwen.engine.sequence import Sequence, Unread
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
        self._share()

    def decode(self) -> list[tuple[Sequence, Emission]]:
        """Write the pending token of every row, and choose the next ones."""
        goes_on = any(not row.at_last_token for row in self.rows)
        pending = [_pending(row) for row in self.rows]
        following: dict[int, Choice] = {}
        logits = None
        if goes_on:
            tokens = tokens_of(pending)
            hidden, self.state, _ = self._model.step(tokens[:, None], self.state)
            logits = self._model.logits(hidden)[:, -1]
            self._see(tokens)
            free = [i for i, row in enumerate(self.rows) if not row.is_one_by_one]
            following = self._choices(logits, dict.fromkeys(free))
            self._decoded += 1
            fills = self.state.mtp if self._decoded % _MOST_UNFILLED == 0 else ()
            asked = [logits] if len(free) < len(self.rows) else []
            mx.async_eval(asked, started(following.values()), *(chain.buffers() for chain in fills))
        emitted = []
        for row, choice in zip(self.rows, pending, strict=True):
            token = choice.known()
            with row.own_fault():
                emitted.append((row, row.emit(token, choice, from_draft=False)))
        if logits is not None:
            following |= self._choices(logits, self._allowed(logits))
        for i, choice in following.items():
            if self.rows[i].goes_on:
                self.rows[i].pending = self.rows[i].replaced(choice)
        self._share()
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
            kept.append(max(1, len(written)))
            emitted += [(row, emission) for emission in written]
        self.state = tape.keep(kept)
        guessing.settled([count - 1 for count in kept])
        self._share()
        return emitted

    def _see(self, tokens: mx.array) -> None:
        """Let the histories of all rows include `tokens` [B]."""
        for i, row in enumerate(self.rows):
            row.history = row.sampler.saw(_history(row), tokens, i)

    def _allowed(self, logits: mx.array) -> dict[int, mx.array | None]:
        """What the rules of each row allow that had to wait for its last token; the caller's own functions choose here.

        `logits` [B, V] are those of all rows.
        """
        masks = {}
        for i, row in enumerate(self.rows):
            if row.is_one_by_one and row.goes_on:
                with row.own_fault():
                    if row.sampler.is_foreign:
                        row.pending = row.choose(logits[i : i + 1])
                    else:
                        masks[i] = row.rules.allowed()
        return masks

    def _choices(self, logits: mx.array, masks: Mapping[int, mx.array | None]) -> dict[int, Choice]:
        """The next token of the rows that `masks` numbers, one of those it allows, from `logits` [B, V] of all rows."""
        if not masks:
            return {}
        picks = [Pick(self.rows[i].sampler, _history(self.rows[i]), mask) for i, mask in masks.items()]
        return dict(zip(masks, choose_all(rows_at(logits, list(masks)), picks), strict=True))

    def _share(self) -> None:
        """Leave the state to a row that is alone with it: of several each gets its own once they part."""
        for row in self.rows:
            row.state = self.state if len(self.rows) == 1 else None

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
