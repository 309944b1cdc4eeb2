"""Draws one token a row from penalized scores [n, V], all rows by the same parameters.

Temperature, then top-k, top-p and min-p on the tempered distribution: the order of transformers' processors. XTC comes
last, as mlx-lm's `apply_xtc` defines it.
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.greedy import Top, top_tokens
from mlx_qwen.model.partial_head import Part
from mlx_qwen.recommended import SamplingParameters


class Place(NamedTuple):
    """Where a token is drawn: token `number` of the answer whose noise `seed` gives."""

    seed: int
    number: int


def drawn(
    scores: mx.array,
    parameters: SamplingParameters,
    places: Sequence[Place],
    spared: mx.array | None,
    *,
    vocab_size: int,
    part: Part | None = None,
    top: Top | None = None,
) -> mx.array:
    """Where in penalized `scores` fp32 [n, V] the tokens [n] are that the noise of each row's place picks.

    `spared` bool [n, V] are tokens that XTC leaves alone; None where there is no XTC. Both may be of a `part` of the
    vocabulary alone: the noise of a token is the same, however many others there are to choose from. `top` are the
    highest of `scores`, where they are known.
    """
    if parameters.temperature == 0:
        return mx.argmax(scores, axis=-1)
    candidates = truncated(scores, parameters, top)
    if spared is not None:
        candidates = _without_top_choices(candidates, parameters, places, spared)
    uniform = _uniform(_keys([(seed, str(number)) for seed, number in places]), vocab_size)
    uniform = uniform if part is None else part.of(uniform)
    if candidates.tokens is None:
        return mx.argmax(candidates.scores + _gumbel(uniform), axis=-1)
    # Noise only of the candidates, which are few.
    noise = _gumbel(mx.take_along_axis(uniform, candidates.tokens, axis=-1))
    best = mx.argmax(candidates.scores + noise, axis=-1)
    return mx.take_along_axis(candidates.tokens, best[:, None], axis=-1)[:, 0]


class Candidates(NamedTuple):
    """Tempered scores [n, K] of the tokens that survive, -inf for the others; `tokens` [n, K], or None for all V."""

    scores: mx.array
    tokens: mx.array | None


def count_ranked(parameters: SamplingParameters, vocab_size: int) -> int:
    """How many of the highest scores a draw needs in order; 0 where it takes all of them as they are."""
    if parameters.temperature == 0:
        return 0
    k = min(parameters.top_k, vocab_size) or vocab_size
    return k if k < vocab_size or parameters.top_p < 1 else 0


def truncated(scores: mx.array, parameters: SamplingParameters, top: Top | None = None) -> Candidates:
    """Applies temperature, top-k, top-p and min-p to scores [n, V] in fp32; the likeliest token always survives.

    Of tokens that tie for the k-th place those with the lowest ids stay, so that never more than k do. `top` are the k
    highest or more, where they are known.
    """
    k, tokens = count_ranked(parameters, scores.shape[-1]), None
    if k:
        top = top or top_tokens(scores, k)
        tokens, scores = top.tokens[:, :k], top.scores[:, :k]
    scores = scores / parameters.temperature
    if parameters.top_p < 1:
        probabilities = mx.softmax(scores, axis=-1)
        likelier = mx.cumsum(probabilities, axis=-1, inclusive=False)
        scores = mx.where(likelier < parameters.top_p, scores, -mx.inf)
    if parameters.min_p > 0:
        floor = scores.max(axis=-1, keepdims=True) + mx.log(mx.array(parameters.min_p))
        scores = mx.where(scores >= floor, scores, -mx.inf)
    return Candidates(scores, tokens)


def _without_top_choices(
    candidates: Candidates, parameters: SamplingParameters, places: Sequence[Place], spared: mx.array
) -> Candidates:
    """XTC: now and then without all tokens above a probability but the least likely of them."""
    scores, tokens = candidates
    probabilities = mx.softmax(scores * parameters.temperature, axis=-1)
    likely = mx.where(probabilities > parameters.xtc_threshold, probabilities, mx.inf)
    excluded = probabilities > likely.min(axis=-1, keepdims=True)
    spared = spared if tokens is None else mx.take_along_axis(spared, tokens, axis=-1)
    happens = _uniform(_keys([(seed, f"xtc {number}") for seed, number in places]), 1) <= parameters.xtc_probability
    return Candidates(mx.where(excluded & ~spared & happens, -mx.inf, scores), tokens)


def _keys(places: Sequence[tuple[int, str]]) -> mx.array:
    """Random bits uint32 [n, 2] for what is drawn of answers with these seeds."""
    digests = (blake2b(f"{seed} {what}".encode(), digest_size=8).digest() for seed, what in places)
    return mx.array([[int.from_bytes(part[:4], "big"), int.from_bytes(part[4:], "big")] for part in digests], mx.uint32)


def _uniform(keys: mx.array, size: int) -> mx.array:
    """Numbers fp32 [n, size] from 0 to 1, of each row as its key alone gives them."""
    # Of Python's numbers MLX makes integers, and launches their conversion.
    low, high = mx.array(0.0), mx.array(1.0)
    if len(keys) == 1:
        return mx.random.uniform(low, high, (1, size), key=keys[0])
    numbers: mx.array = mx.vmap(lambda key: mx.random.uniform(low, high, (size,), key=key))(keys)
    return numbers


def _gumbel(uniform: mx.array) -> mx.array:
    """The noise that `mx.random.gumbel` makes of such numbers."""
    return -mx.log(-mx.log(uniform))
