"""Forward passes: a piece of a prompt, a token for every row of a batch, or a verification of drafts."""

from collections.abc import Sequence as Listed

import mlx.core as mx
import numpy as np

from mlx_qwen.engine.depth import MOST_DRAFTS
from mlx_qwen.engine.guessing import Guessing
from mlx_qwen.engine.sampling import Choice
from mlx_qwen.engine.sequence import Emission, Sequence, Unread
from mlx_qwen.errors import MLXQwenError
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
        sequence.state = model.step(tokens, state, embedded=part, last=True).state
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
        _start([sequence.pending])


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
        following: list[Choice | mx.array] = []
        goes_on = any(not row.at_last_token for row in self.rows)
        pending = [_pending(row) for row in self.rows]
        if goes_on:
            tokens = mx.concatenate([choice.token for choice in pending])
            hidden, self.state, _ = self._model.step(tokens[:, None], self.state)
            logits = self._model.logits(hidden)[:, -1]
            for i, row in enumerate(self.rows):
                history = row.history
                assert history is not None, "the prompt has been read"
                row.history = row.sampler.saw(history, pending[i].token)
                part = logits if len(self.rows) == 1 else logits[i : i + 1]
                following.append(part if row.is_one_by_one else row.sampler.choose(part, row.history))
            self._decoded += 1
            fills = self.state.mtp if self._decoded % _MOST_UNFILLED == 0 else ()
            mx.async_eval(*(_arrays(each) for each in following), *(chain.buffers() for chain in fills))
        emitted = [
            (row, row.emit(_token(choice), choice, from_draft=False))
            for row, choice in zip(self.rows, pending, strict=True)
        ]
        for row, coming in zip(self.rows, following, strict=False):
            if row.finish_reason is None:
                row.pending = row.choose(coming) if isinstance(coming, mx.array) else row.replaced(coming)
        if goes_on:
            self._hand_back()
        return emitted

    def verify(self, guessing: Guessing) -> list[tuple[Sequence, Emission]]:
        """As `decode`, with more tokens of each row, where what is guessed of it is what it would have chosen."""
        rows = self.rows
        assert 0 < guessing.depth <= MOST_DRAFTS, "a batch without drafts decodes"
        pending = [_pending(row) for row in rows]
        tokens = mx.concatenate([choice.token for choice in pending])
        for row, choice in zip(rows, pending, strict=True):
            assert row.history is not None, "the prompt has been read"
            row.history = row.sampler.saw(row.history, choice.token)
        guesses = guessing.guesses(Unread(self.state, rows, tokens))
        ids = mx.concatenate([tokens[:, None], guesses.astype(tokens.dtype)], axis=1)
        hidden, _, tape = self._model.step(ids, self.state, tape=True)
        assert tape is not None, "a tape was asked for"
        logits = self._model.logits(hidden)
        answers = [_Verified(row, ids[i], logits[i], guessing.depths[i]) for i, row in enumerate(rows)]
        mx.async_eval(ids, *(_arrays(choice) for answer in answers for choice in answer.choices), logits)
        proposed: list[list[int]] = np.array(ids).tolist()
        for answer, mine in zip(answers, proposed, strict=True):
            answer.constrain(mine)
        emitted, kept = [], []
        for row, choice, answer, mine in zip(rows, pending, answers, proposed, strict=True):
            written = answer.settle(choice, mine)
            kept.append(len(written))
            emitted += [(row, emission) for emission in written]
        self.state = tape.keep(kept)
        guessing.settled([count - 1 for count in kept])
        self._hand_back()
        return emitted

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


class _Verified:
    """What the model says to one row's drafts: its own choice after each of the verified tokens."""

    def __init__(self, row: Sequence, ids: mx.array, logits: mx.array, depth: int) -> None:
        self._row, self._ids, self._logits, self._depth = row, ids, logits, depth
        assert row.history is not None, "the prompt has been read"
        self._histories = [row.history]
        self.choices: list[Choice] = []
        if not row.is_one_by_one:
            for i in range(depth + 1):
                self.choices.append(row.sampler.choose(logits[i : i + 1], self._histories[i]))
                self._see(i)

    def constrain(self, ids: Listed[int]) -> None:
        """Choose by what the row's rules allow behind each of its tokens, all asked while the pass is computed."""
        if self.choices or self._row.sampler.is_foreign:
            return
        for i, mask in enumerate(self._row.rules.allowed_behind(ids[: self._depth + 1])):
            self.choices.append(self._row.sampler.choose(self._logits[i : i + 1], self._histories[i], mask))
            self._see(i)
        _start(self.choices)

    def settle(self, pending: Choice, ids: Listed[int]) -> list[Emission]:
        """Write the pending token and the drafts that the model agrees with; the row is left with its next choice."""
        row = self._row
        written = [row.emit(_token(pending), pending, from_draft=False)]
        for i in range(self._depth + 1):
            if row.finish_reason is not None:
                break
            choice = self._choice(i)
            if i == self._depth or ids[i + 1] != _token(choice) or len(row.written) + 1 >= row.max_tokens:
                row.pending = choice
                break
            written.append(row.emit(ids[i + 1], choice, from_draft=True))
        row.history = self._histories[len(written) - 1]
        return written

    def _choice(self, i: int) -> Choice:
        row = self._row
        if self.choices:
            return row.replaced(self.choices[i])
        row.history = self._histories[i]
        choice = row.choose(self._logits[i : i + 1])
        self._see(i)
        return choice

    def _see(self, i: int) -> None:
        if i < self._depth:
            self._histories.append(self._row.sampler.saw(self._histories[i], self._ids[i + 1 : i + 2]))


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


def _arrays(choice: Choice | mx.array) -> list[mx.array]:
    return [choice] if isinstance(choice, mx.array) else [choice.token, choice.logprob, *choice.top]


def _start(choices: Listed[Choice]) -> None:
    mx.async_eval(*(_arrays(choice) for choice in choices))


def _token(choice: Choice) -> int:
    token, logprob = choice.token.item(), choice.logprob.item()
    assert isinstance(token, int), "samplers return token ids"
    if logprob != logprob:  # noqa: PLR0124, only NaN differs from itself
        raise MLXQwenError(
            "The model's logits are not numbers (NaN). The weights are damaged or overflow in this dtype: "
            "convert the checkpoint again, or load it with dtype bfloat16 or float32."
        )
    return token
