"""Tokens that were chosen, with what they were chosen from: of many rows at once, and one row's share of it."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import MLXQwenError


class Chosen:
    """Tokens [n], their log-probabilities fp32 [n], and those of all tokens: `scores` [n, V] less `total` fp32 [n, 1].

    `scores` are of any float dtype, and computed: who reads them may be another thread.

    `top`: the likeliest tokens [n, K] and their log-probabilities [n, K], likeliest first, where they were asked for.
    """

    __slots__ = ("_known", "logprobs", "scores", "tokens", "top", "total")

    def __init__(
        self,
        tokens: mx.array,
        logprobs: mx.array,
        scores: mx.array,
        total: mx.array,
        top: tuple[mx.array, ...] = (),
    ) -> None:
        self.tokens, self.logprobs, self.scores, self.total, self.top = tokens, logprobs, scores, total, top
        self._known: list[tuple[int, float]] | None = None

    def arrays(self) -> tuple[mx.array, ...]:
        """What a reader needs, to be computed ahead."""
        return self.tokens, self.logprobs, *self.top

    def known(self) -> list[tuple[int, float]]:
        """Each token and its log-probability, waited for once."""
        if self._known is None:
            self._known = list(zip(np.array(self.tokens).tolist(), np.array(self.logprobs).tolist(), strict=True))
        return self._known


class Choice(NamedTuple):
    """One row of what was `chosen`; `forced` is the token that a rule put in the place of the one that was drawn."""

    chosen: Chosen
    row: int
    forced: int | None = None

    @property
    def token(self) -> mx.array:
        """The token uint32 [1]."""
        return mx.array([self.forced], mx.uint32) if self.forced is not None else self._own(self.chosen.tokens)

    @property
    def logprob(self) -> mx.array:
        """Its log-probability fp32 [1]."""
        if self.forced is None:
            return self._own(self.chosen.logprobs)
        return self.scores[:, self.forced] - self._own(self.chosen.total)[0]

    @property
    def scores(self) -> mx.array:
        """What all tokens were given [1, V], fp32: logits after penalties."""
        return self._own(self.chosen.scores).astype(mx.float32)

    @property
    def logprobs(self) -> mx.array:
        """Log-probabilities of all tokens [1, V], computed when they are used."""
        return self.scores - self._own(self.chosen.total)

    @property
    def top(self) -> tuple[mx.array, ...]:
        """The likeliest tokens [1, K] and their log-probabilities [1, K], where they were asked for."""
        return tuple(self._own(part) for part in self.chosen.top)

    def replaced_by(self, token: int) -> "Choice":
        """The same distribution with another token taken from it."""
        return self._replace(forced=token)

    def known(self) -> int:
        """The token, waited for. Raises MLXQwenError where the logits were not numbers."""
        token, logprob = self.chosen.known()[self.row]
        if logprob != logprob:  # noqa: PLR0124, only NaN differs from itself
            raise MLXQwenError(
                "The model's logits are not numbers (NaN). The weights are damaged or overflow in this dtype: "
                "convert the checkpoint again, or load it with dtype bfloat16 or float32."
            )
        return token if self.forced is None else self.forced

    def _own(self, part: mx.array) -> mx.array:
        return part if len(part) == 1 else part[self.row : self.row + 1]


def tokens_of(choices: Sequence[Choice]) -> mx.array:
    """The tokens uint32 [n] of `choices`; those of one batch in its own order are taken as they lie."""
    chosen = choices[0].chosen
    whole = len(chosen.tokens) == len(choices)
    if whole and all(one.chosen is chosen and one.row == i and one.forced is None for i, one in enumerate(choices)):
        return chosen.tokens
    return mx.concatenate([choice.token for choice in choices])
