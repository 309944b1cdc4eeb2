"""Draws one token from logits.

Bias, repetition, presence and frequency penalty, temperature, then top-k, top-p and min-p on the tempered distribution:
the order of transformers' processors, which have no such penalties. XTC comes last, as mlx-lm's `apply_xtc` defines it.
"""

import secrets
import threading
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import PromptError
from mlx_qwen.options import LogitsProcessor, Sampler
from mlx_qwen.recommended import SamplingParameters


class Choice(NamedTuple):
    """A token [1], its log-probability [1], and those of all tokens: `scores` [1, V] less `total` [1, 1]; fp32.

    `top`: the likeliest tokens [1, K] and their log-probabilities [1, K], likeliest first, where they were asked for.
    """

    token: mx.array
    logprob: mx.array
    scores: mx.array
    total: mx.array
    top: tuple[mx.array, ...] = ()

    @property
    def logprobs(self) -> mx.array:
        """Log-probabilities of all tokens [1, V], computed when they are used."""
        return self.scores - self.total

    def replaced_by(self, token: int) -> "Choice":
        """The same distribution with another token taken from it."""
        return self._replace(token=mx.array([token], mx.uint32), logprob=self.scores[:, token] - self.total[0])


class Candidates(NamedTuple):
    """Tempered scores [1, K] of the tokens that survive, -inf for the others; `tokens` [1, K], or None for all V."""

    scores: mx.array
    tokens: mx.array | None


class History(NamedTuple):
    """What came before a token, as far as its choice depends on it.

    Attributes:
        written: how many tokens the answer has.
        present: fp32 [1, V], the presence penalty of each token; None without one.
        counts: fp32 [1, V], how often the answer has each token; None without a frequency penalty.
        repeated: bool [1, V], the tokens of prompt and answer; None without a repetition penalty.
        tokens: prompt and answer [n]; None where no processor reads them.
    """

    written: int
    present: mx.array | None
    counts: mx.array | None
    repeated: mx.array | None
    tokens: mx.array | None


class TokenSampler:
    """How one answer's tokens are chosen.

    `prompt` [n] are all tokens before the answer; presence penalty does not count them. Token n of an answer is drawn
    by noise that depends on the seed and n alone: with the same seed the same logits give the same tokens, whatever
    else draws from `mx.random`, and whoever guesses from similar logits is likely to draw the same token. Without a
    seed one comes from `mx.random`, outside the main thread from the system, and is in `seed`; `is_repeatable` says
    whether the same request gives the same answer.
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
        logit_bias: Mapping[int, float] | None = None,
        spared_by_xtc: Sequence[int] = (),
        top_logprobs: int = 0,
    ) -> None:
        self.parameters = parameters
        self.vocab_size = vocab_size
        self._top = min(top_logprobs, vocab_size)
        self._sampler = sampler
        self._processors = tuple(logits_processors)
        self.prompt = prompt
        draws = sampler is None and parameters.temperature > 0
        self.is_repeatable = not draws or seed is not None
        self.seed = _fresh_seed() if draws and seed is None else seed or 0
        self._penalty = mx.array([[parameters.presence_penalty]], mx.float32)
        self._bias = None if not logit_bias else _dense_bias(logit_bias, vocab_size)
        self._spared = None
        if parameters.xtc_probability > 0:
            spared = np.zeros((1, vocab_size), np.bool_)
            spared[0, [token for token in spared_by_xtc if token < vocab_size]] = True
            self._spared = mx.array(spared)

    @property
    def is_foreign(self) -> bool:
        """Whether the caller's own functions choose, which have to see the tokens one by one."""
        return self._sampler is not None or bool(self._processors)

    def start(self) -> History:
        """The history before the answer."""
        repeated = None
        if self.parameters.repetition_penalty != 1:
            repeated = mx.zeros((1, self.vocab_size), mx.bool_)
            repeated[0, self.prompt] = True
        present = mx.zeros((1, self.vocab_size)) if self.parameters.presence_penalty else None
        counts = mx.zeros((1, self.vocab_size)) if self.parameters.frequency_penalty else None
        return History(0, present, counts, repeated, self.prompt if self._processors else None)

    def saw(self, history: History, token: mx.array) -> History:
        """The history with one token [1] more."""
        written, present, counts, repeated, tokens = history
        if present is not None:
            present = mx.put_along_axis(present, token[:, None], self._penalty, axis=-1)
        if counts is not None:
            seen = mx.take_along_axis(counts, token[:, None], axis=-1)
            counts = mx.put_along_axis(counts, token[:, None], seen + 1, axis=-1)
        if repeated is not None:
            repeated = mx.put_along_axis(repeated, token[:, None], mx.array([[True]]), axis=-1)
        tokens = None if tokens is None else mx.concatenate([tokens, token])
        return History(written + 1, present, counts, repeated, tokens)

    def choose(self, logits: mx.array, history: History, allowed: mx.array | None = None) -> Choice:
        """The next token for `logits` [1, V]; where `allowed` bool [1, V] is given, one of those.

        Raises:
            PromptError: the caller's own sampler returned what is no token of the vocabulary.
        """
        scores = self._penalized(logits.astype(mx.float32), history)
        for processor in self._processors:
            assert history.tokens is not None, "processors are given the tokens"
            scores = processor(history.tokens, scores)
        if allowed is not None:
            scores = mx.where(allowed, scores, -mx.inf)
        total = mx.logsumexp(scores, axis=-1, keepdims=True)
        if self._sampler is not None:
            token = self._checked(self._sampler(scores - total))
        else:
            token = self.likely(scores, history)
        logprob = mx.take_along_axis(scores, token[:, None], axis=-1) - total
        return Choice(token, logprob[0], scores, total, self._likeliest(scores, total))

    def likely(self, scores: mx.array, history: History) -> mx.array:
        """The token [1] that the answer's own noise picks from penalized `scores` fp32 [1, V]."""
        if self.parameters.temperature == 0:
            return mx.argmax(scores, axis=-1)
        candidates = self._without_top_choices(truncated(scores, self.parameters), history)
        noise = mx.random.gumbel(scores.shape, key=_key(self.seed, history.written))
        if candidates.tokens is None:
            return mx.argmax(candidates.scores + noise, axis=-1)
        best = mx.argmax(candidates.scores + mx.take_along_axis(noise, candidates.tokens, axis=-1), axis=-1)
        return mx.take_along_axis(candidates.tokens, best[:, None], axis=-1)[:, 0]

    def _likeliest(self, scores: mx.array, total: mx.array) -> tuple[mx.array, ...]:
        if not self._top:
            return ()
        tokens = _ranked(scores, self._top)
        return tokens, mx.take_along_axis(scores, tokens, axis=-1) - total

    def _without_top_choices(self, candidates: Candidates, history: History) -> Candidates:
        """XTC: now and then without all tokens above a probability but the least likely of them."""
        if self._spared is None:
            return candidates
        scores, tokens = candidates
        probabilities = mx.softmax(scores * self.parameters.temperature, axis=-1)
        likely = mx.where(probabilities > self.parameters.xtc_threshold, probabilities, mx.inf)
        excluded = probabilities > likely.min(axis=-1, keepdims=True)
        spared = self._spared if tokens is None else mx.take_along_axis(self._spared, tokens, axis=-1)
        happens = mx.random.uniform(key=_key(self.seed, f"xtc {history.written}")) <= self.parameters.xtc_probability
        return Candidates(mx.where(excluded & ~spared & happens, -mx.inf, scores), tokens)

    def draft(self, logits: mx.array, history: History) -> mx.array:
        """A guess [1] at the token that `choose` will take, from a draft's logits [1, V], shaped as the model's are."""
        scores = self._penalized(logits.astype(mx.float32), history)
        return mx.argmax(scores, axis=-1) if self.is_foreign else self.likely(scores, history)

    def _penalized(self, scores: mx.array, history: History) -> mx.array:
        if self._bias is not None:
            scores = scores + self._bias
        if history.repeated is not None:
            penalty = self.parameters.repetition_penalty
            scores = mx.where(history.repeated, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
        if history.counts is not None:
            scores = scores - self.parameters.frequency_penalty * history.counts
        return scores if history.present is None else scores - history.present

    def _checked(self, token: mx.array) -> mx.array:
        drawn = [int(one) for one in np.array(token).reshape(-1)]
        if len(drawn) != 1 or not 0 <= drawn[0] < self.vocab_size:
            raise PromptError(
                f"The sampler returned {drawn}, expected one token id from 0 to {self.vocab_size - 1}: it gets "
                "log-probabilities [1, V] and returns a token [1]."
            )
        return token.astype(mx.uint32).reshape(1)


def _dense_bias(biases: Mapping[int, float], vocab_size: int) -> mx.array:
    dense = np.zeros((1, vocab_size), np.float32)
    for token, bias in biases.items():
        if token >= vocab_size:
            raise PromptError(f"logit_bias names token {token}; this vocabulary ends with {vocab_size - 1}.")
        dense[0, token] = bias
    return mx.array(dense)


def _key(seed: int, index: int | str) -> mx.array:
    """Random bits for token `index` of an answer."""
    digest = blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return mx.array([int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")], mx.uint32)


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
    """From `mx.random`, whose state MLX starts alike in each thread: outside the main one the system gives another."""
    if threading.current_thread() is not threading.main_thread():
        return secrets.randbelow(2**31 - 1)
    seed = mx.random.randint(0, 2**31 - 1).item()
    assert isinstance(seed, int), "randint draws integers"
    return seed
