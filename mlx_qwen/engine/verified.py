"""What the model says to the drafts of each row of a batch, and which of them are written."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listed

import mlx.core as mx

from mlx_qwen.engine.choice import Choice
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.sampling import History, Pick, choose_all, rows_at
from mlx_qwen.engine.sequence import Sequence


class Verified:
    """The model's own choice after each of one row's verified tokens: `ids` [T], of which `depth` are guesses."""

    def __init__(self, row: Sequence, ids: mx.array, logits: mx.array, depth: int) -> None:
        assert row.history is not None, "the prompt has been read"
        self.row, self.depth = row, depth
        self._logits = logits
        self.histories: list[History] = [row.history]
        for i in range(depth):
            self.histories.append(row.sampler.saw(self.histories[i], ids, i + 1))
        self.choices: list[Choice] = []

    def settle(self, pending: Choice, ids: Listed[int]) -> list[Emission]:
        """Write the pending token and the drafts that the model agrees with; the row is left with its next choice."""
        row, token = self.row, pending.known()
        written: list[Emission] = []
        if not row.goes_on:
            return written
        with row.own_fault():
            written.append(row.emit(token, pending, from_draft=False))
            for i in range(self.depth + 1):
                if row.finish_reason is not None:
                    break
                choice = self._choice(i)
                if i == self.depth or ids[i + 1] != choice.known() or len(row.written) + 1 >= row.max_tokens:
                    row.pending = choice
                    break
                written.append(row.emit(ids[i + 1], choice, from_draft=True))
            row.history = self.histories[len(written) - 1]
        return written

    def _choice(self, i: int) -> Choice:
        row = self.row
        if self.choices:
            return row.replaced(self.choices[i])
        row.history = self.histories[i]
        return row.choose(self._logits[i : i + 1])


def choose_verified(answers: Listed[Verified], logits: mx.array) -> None:
    """Choose, from `logits` [B, T, V], for the rows that need not wait for the tokens before."""
    free = [i for i, one in enumerate(answers) if not one.row.is_one_by_one]
    _choose(answers, logits, {i: [None] * (answers[i].depth + 1) for i in free})


def constrain_verified(answers: Listed[Verified], logits: mx.array, ids: Listed[Listed[int]]) -> None:
    """Choose for the others by what their rules allow behind each of their tokens, all asked while these are computed.

    `ids` are the verified tokens of each row. Where the caller's own functions choose, they are asked one by one.
    """
    masks = {}
    for i, one in enumerate(answers):
        if not one.choices and not one.row.sampler.is_foreign:
            with one.row.own_fault():
                masks[i] = one.row.rules.allowed_behind(ids[i][: one.depth + 1])
    if masks:
        _choose(answers, logits, masks)
        mx.async_eval(started(choice for i in masks for choice in answers[i].choices))


def started(choices: Iterable[Choice]) -> list[tuple[mx.array, ...]]:
    """What is to be computed ahead of `choices`, each array once."""
    return [chosen.arrays() for chosen in {id(choice.chosen): choice.chosen for choice in choices}.values()]


def _choose(answers: Listed[Verified], logits: mx.array, masks: Mapping[int, Listed[mx.array | None]]) -> None:
    """Fill in the choices of the answers that `masks` numbers, behind each of their tokens."""
    if not masks:
        return
    B, T, V = logits.shape
    picks = [
        Pick(answers[i].row.sampler, history, mask)
        for i, allowed in masks.items()
        for history, mask in zip(answers[i].histories, allowed, strict=True)
    ]
    places = [i * T + at for i in masks for at in range(answers[i].depth + 1)]
    choices = iter(choose_all(rows_at(logits.reshape(B * T, V), places), picks))
    for i, allowed in masks.items():
        answers[i].choices = [next(choices) for _ in allowed]
