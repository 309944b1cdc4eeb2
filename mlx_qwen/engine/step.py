"""The decoding loop: one token at a time for every row, never waiting for a token before building the next step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.engine.interrupts import Uninterrupted
from mlx_qwen.engine.rules import ThinkingBudget
from mlx_qwen.engine.sampling import Choice, TokenSampler
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.model import Model
from mlx_qwen.model.state import HybridCache

_STEPS_BETWEEN_CLEARING = 256


@dataclass(frozen=True, slots=True)
class Row:
    """What chooses the tokens of one answer in a batch."""

    sampler: TokenSampler
    budget: ThinkingBudget | None = None

    def choose(self, logits: mx.array, previous: mx.array | None) -> Choice:
        """The token after `previous` [1], unless the budget replaces it."""
        return self.sampler.choose(logits, previous)

    def replaced(self, choice: Choice) -> Choice:
        """`choice`, or the token that the thinking budget puts in its place."""
        forced = self.budget.next_token() if self.budget else None
        return choice if forced is None else choice.replaced_by(forced)

    def saw(self, token: int) -> None:
        """Tells the budget which token came."""
        if self.budget:
            self.budget.saw(token)


class Step(NamedTuple):
    """One token of every row, and the log-probabilities [1, V] that it was taken from."""

    tokens: list[int]
    logprobs: list[mx.array]


def decode(
    model: Model, cache: HybridCache, logits: mx.array, rows: Sequence[Row], *, max_tokens: int
) -> Iterator[Step]:
    """Yields up to `max_tokens` steps, beginning with the tokens chosen from the prompt's `logits` [B, V].

    Step n + 1 is built and started from the unevaluated token n before token n is read, so that the device never waits
    for Python. When a step is yielded the cache holds its tokens too, except for the last of `max_tokens`.
    Raises MLXQwenError when the logits are not numbers.
    """
    choices = [row.replaced(row.choose(part, None)) for row, part in zip(rows, _by_row(logits), strict=True)]
    _start(choices)
    for step in range(max_tokens):
        following: list[Choice] = []
        if step + 1 < max_tokens:
            with Uninterrupted():
                following = _advance(model, cache, choices, rows)
            _start(following)
        tokens = [_read(choice) for choice in choices]
        for row, token in zip(rows, tokens, strict=True):
            row.saw(token)
        yield Step(tokens, [choice.logprobs for choice in choices])
        choices = [row.replaced(choice) for row, choice in zip(rows, following, strict=False)]
        if step % _STEPS_BETWEEN_CLEARING == 0:
            mx.clear_cache()


def _advance(model: Model, cache: HybridCache, choices: list[Choice], rows: Sequence[Row]) -> list[Choice]:
    tokens = [choice.token for choice in choices]
    batch = tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)
    hidden = model.hidden_states(batch[:, None], cache)
    logits = model.logits(hidden)[:, -1]
    return [row.choose(part, token) for row, part, token in zip(rows, _by_row(logits), tokens, strict=True)]


def _by_row(logits: mx.array) -> list[mx.array]:
    B = logits.shape[0]
    return [logits] if B == 1 else [logits[row : row + 1] for row in range(B)]


def _start(choices: list[Choice]) -> None:
    mx.async_eval([choice.token for choice in choices], [choice.logprob for choice in choices])


def _read(choice: Choice) -> int:
    token, logprob = choice.token.item(), choice.logprob.item()
    assert isinstance(token, int), "samplers return token ids"
    if logprob != logprob:  # noqa: PLR0124, only NaN differs from itself
        raise MLXQwenError(
            "The model's logits are not numbers (NaN). The weights are damaged or overflow in this dtype: "
            "convert the checkpoint again, or load it with dtype bfloat16 or float32."
        )
    return token
