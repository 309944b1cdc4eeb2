"""Draws one token from logits.

Repetition penalty, presence penalty, temperature, then top-k, top-p and min-p on the tempered distribution: the order
of transformers' processors, which have no presence penalty.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.options import LogitsProcessor, Sampler
from mlx_qwen.recommended import SamplingParameters


class Choice(NamedTuple):
    """A token [1], its log-probability [1] and, not yet computed, those of all tokens [1, V]; fp32."""

    token: mx.array
    logprob: mx.array
    logprobs: mx.array

    def replaced_by(self, token: int) -> "Choice":
        """The same distribution with another token taken from it."""
        return Choice(mx.array([token], mx.uint32), self.logprobs[:, token], self.logprobs)


class Candidates(NamedTuple):
    """Tempered scores [1, K] of the tokens that survive, -inf for the others; `tokens` [1, K], or None for all V."""

    scores: mx.array
    tokens: mx.array | None


class TokenSampler:
    """One answer's sampling: its parameters, random numbers and the tokens its penalties remember.

    `prompt` [n] are all tokens before the answer; presence penalty does not count them. With the same seed the same
    logits give the same tokens, whatever else draws from `mx.random`; without one, the seed comes from there.
    """

    def __init__(
        self,
        parameters: SamplingParameters,
        *,
        prompt: mx.array,
        vocab_size: int,
        seed: int | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.parameters = parameters
        self._sampler = sampler
        self._processors = tuple(logits_processors)
        self._history = prompt
        draws = sampler is None and parameters.temperature > 0
        self._random = random.Random(_fresh_seed() if draws and seed is None else seed)
        self._presence_penalty = mx.array([[parameters.presence_penalty]], mx.float32)
        self._present = mx.zeros((1, vocab_size)) if parameters.presence_penalty else None
        self._repeated: mx.array | None = None
        if parameters.repetition_penalty != 1:
            self._repeated = mx.zeros((1, vocab_size), mx.bool_)
            self._repeated[0, prompt] = True

    def choose(self, logits: mx.array, previous: mx.array | None) -> Choice:
        """The next token for `logits` [1, V], given the token [1] before it (None for the first of the answer)."""
        if previous is not None:
            self._remember(previous)
        scores = self._penalized(logits.astype(mx.float32))
        for processor in self._processors:
            scores = processor(self._history, scores)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        logprobs = scores - total
        if self._sampler is not None:
            token = self._sampler(logprobs).astype(mx.uint32).reshape(1)
        elif self.parameters.temperature == 0:
            token = mx.argmax(scores, axis=-1)
        else:
            token = self._draw(scores)
        logprob = mx.take_along_axis(scores, token[:, None], axis=-1) - total
        return Choice(token, logprob, logprobs)

    def _remember(self, token: mx.array) -> None:
        if self._present is not None:
            self._present = mx.put_along_axis(self._present, token[:, None], self._presence_penalty, axis=-1)
        if self._repeated is not None:
            self._repeated = mx.put_along_axis(self._repeated, token[:, None], mx.array([[True]]), axis=-1)
        if self._processors:
            self._history = mx.concatenate([self._history, token])

    def _penalized(self, scores: mx.array) -> mx.array:
        if self._repeated is not None:
            penalty = self.parameters.repetition_penalty
            scores = mx.where(self._repeated, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
        return scores if self._present is None else scores - self._present

    def _draw(self, scores: mx.array) -> mx.array:
        candidates = truncated(scores, self.parameters)
        key = mx.array([self._random.getrandbits(32), self._random.getrandbits(32)], mx.uint32)
        drawn = mx.random.categorical(candidates.scores, key=key)
        if candidates.tokens is None:
            return drawn
        return mx.take_along_axis(candidates.tokens, drawn[:, None], axis=-1)[:, 0]


def truncated(scores: mx.array, parameters: SamplingParameters) -> Candidates:
    """Applies temperature, top-k, top-p and min-p to scores [1, V] in fp32; the likeliest token always survives.

    Of tokens that tie for the k-th place, those with a place among the k stay, so that never more than k do.
    """
    scores = scores / parameters.temperature
    vocab_size = scores.shape[-1]
    k = min(parameters.top_k, vocab_size) or vocab_size
    tokens = None
    if k < vocab_size or parameters.top_p < 1:
        tokens = _ranked(scores, k)
        scores = mx.take_along_axis(scores, tokens, axis=-1)
    if parameters.top_p < 1:
        probabilities = mx.softmax(scores, axis=-1)
        likelier = mx.cumsum(probabilities, axis=-1, inclusive=False)
        scores = mx.where(likelier < parameters.top_p, scores, -mx.inf)
    if parameters.min_p > 0:
        floor = scores.max(axis=-1, keepdims=True) + mx.log(mx.array(parameters.min_p))
        scores = mx.where(scores >= floor, scores, -mx.inf)
    return Candidates(scores, tokens)


def _ranked(scores: mx.array, k: int) -> mx.array:
    """Indices of the k highest of scores [1, V], highest first; only those k are sorted."""
    negative = -scores
    if k == scores.shape[-1]:
        return mx.argsort(negative, axis=-1)
    best = mx.argpartition(negative, kth=k - 1, axis=-1)[:, :k]
    order = mx.argsort(mx.take_along_axis(negative, best, axis=-1), axis=-1)
    return mx.take_along_axis(best, order, axis=-1)


def _fresh_seed() -> int:
    seed = mx.random.randint(0, 2**31 - 1).item()
    assert isinstance(seed, int), "randint draws integers"
    return seed
