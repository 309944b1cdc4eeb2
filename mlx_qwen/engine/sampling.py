"""Chooses tokens from logits: bias, repetition, presence and frequency penalty, then a draw.

transformers' processors have no such penalties but the repetition penalty, which comes first there too.
"""

import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from metal_kernels.greedy import Top, best_tokens, top_tokens
from mlx_qwen.engine.choice import Choice, Chosen
from mlx_qwen.engine.drawing import Place, count_ranked, drawn
from mlx_qwen.errors import PromptError
from mlx_qwen.model.partial_head import Part
from mlx_qwen.options import LogitsProcessor, Sampler
from mlx_qwen.recommended import SamplingParameters


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
        self.top = min(top_logprobs, vocab_size)
        self.foreign = sampler
        self.processors = tuple(logits_processors)
        self.prompt = prompt
        draws = sampler is None and parameters.temperature > 0
        self.is_repeatable = not draws or seed is not None
        self.seed = _fresh_seed() if draws and seed is None else seed or 0
        self._penalty = mx.array([[parameters.presence_penalty]], mx.float32)
        self.bias = None if not logit_bias else _dense_bias(logit_bias, vocab_size)
        self.spared = None
        if parameters.xtc_probability > 0:
            spared = np.zeros((1, vocab_size), np.bool_)
            spared[0, [token for token in spared_by_xtc if token < vocab_size]] = True
            self.spared = mx.array(spared)
        # Tokens of samplers with the same kind are chosen by the same operations.
        alone = id(self) if self.is_foreign else None
        self.kind = (parameters, vocab_size, self.top, self.bias is None, alone)

    @property
    def is_foreign(self) -> bool:
        """Whether the caller's own functions choose, which have to see the tokens one by one."""
        return self.foreign is not None or bool(self.processors)

    def start(self) -> History:
        """The history before the answer."""
        repeated = None
        if self.parameters.repetition_penalty != 1:
            repeated = mx.zeros((1, self.vocab_size), mx.bool_)
            repeated[0, self.prompt] = True
        present = mx.zeros((1, self.vocab_size)) if self.parameters.presence_penalty else None
        counts = mx.zeros((1, self.vocab_size)) if self.parameters.frequency_penalty else None
        return History(0, present, counts, repeated, self.prompt if self.processors else None)

    def saw(self, history: History, tokens: mx.array, index: int = 0) -> History:
        """The history with one token more, that with this index of `tokens` [n]."""
        written, present, counts, repeated, seen = history
        if present is None and counts is None and repeated is None and seen is None:
            return history._replace(written=written + 1)
        token = tokens if len(tokens) == 1 else tokens[index : index + 1]
        if present is not None:
            present = mx.put_along_axis(present, token[:, None], self._penalty, axis=-1)
        if counts is not None:
            count = mx.take_along_axis(counts, token[:, None], axis=-1)
            counts = mx.put_along_axis(counts, token[:, None], count + 1, axis=-1)
        if repeated is not None:
            repeated = mx.put_along_axis(repeated, token[:, None], mx.array([[True]]), axis=-1)
        seen = None if seen is None else mx.concatenate([seen, token])
        return History(written + 1, present, counts, repeated, seen)

    def choose(self, logits: mx.array, history: History, allowed: mx.array | None = None) -> Choice:
        """The next token for `logits` [1, V]; where `allowed` bool [1, V] is given, one of those.

        Raises:
            PromptError: the caller's own sampler returned what is no token of the vocabulary.
        """
        return Choice(_chosen(logits, [Pick(self, history, allowed)]), 0)

    def draft(self, logits: mx.array, history: History, part: Part | None = None) -> mx.array:
        """A guess [1] at the token that `choose` will take, from a draft's logits [1, V], shaped as the model's are.

        With a `part` of the vocabulary `logits` are those of its tokens [1, part.size], and the guess is one of them.
        """
        return _guessed(logits, [Pick(self, history, part=part)])

    def checked(self, token: mx.array) -> mx.array:
        """What the caller's own sampler returned, if it is a token [1]; PromptError otherwise."""
        given = [int(one) for one in np.array(token).reshape(-1)]
        if len(given) != 1 or not 0 <= given[0] < self.vocab_size:
            raise PromptError(
                f"The sampler returned {given}, expected one token id from 0 to {self.vocab_size - 1}: it gets "
                "log-probabilities [1, V] and returns a token [1]."
            )
        return token.astype(mx.uint32).reshape(1)


class Pick(NamedTuple):
    """A token to be chosen: by whom, behind what, and of which (bool [1, V], None for all).

    A guess may be chosen from a `part` of the vocabulary, whose logits alone there are.
    """

    sampler: TokenSampler
    history: History
    allowed: mx.array | None = None
    part: Part | None = None


def choose_all(logits: mx.array, picks: Sequence[Pick]) -> list[Choice]:
    """The next token of every row of `logits` [n, V], each as its own sampler chooses it alone; those alike at once."""
    choices: dict[int, Choice] = {}
    for members in _alike(picks):
        chosen = _chosen(rows_at(logits, members), [picks[i] for i in members])
        choices |= {i: Choice(chosen, row) for row, i in enumerate(members)}
    return [choices[i] for i in range(len(picks))]


def guess_all(logits: mx.array, picks: Sequence[Pick], computed: Part | None = None) -> mx.array:
    """Guesses [n] at the tokens that `choose_all` will take, from drafts' logits [n, V].

    Where only a part was `computed`, [n, computed.size], each row's own part lies within it.
    """
    groups, guesses = _alike(picks), []
    for members in groups:
        own, part = rows_at(logits, members), picks[members[0]].part
        if part is not None:
            own = part.of(own) if computed is None else part.of_wider(computed, own)
        guesses.append(_guessed(own, [picks[i] for i in members]))
    if len(groups) == 1:
        return guesses[0]
    order = np.argsort([i for members in groups for i in members])
    return mx.concatenate(guesses)[mx.array(order)]


def _alike(picks: Sequence[Pick]) -> list[list[int]]:
    if len(picks) == 1:
        return [[0]]
    groups: dict[object, list[int]] = {}
    for i, pick in enumerate(picks):
        groups.setdefault((pick.sampler.kind, pick.allowed is None, pick.part), []).append(i)
    return list(groups.values())


def rows_at(logits: mx.array, members: Sequence[int]) -> mx.array:
    """The rows with these numbers, ascending, of `logits` [n, V]."""
    if len(members) == len(logits):
        return logits
    return logits[members[0] : members[0] + 1] if len(members) == 1 else logits[mx.array(list(members))]


def _chosen(logits: mx.array, picks: Sequence[Pick]) -> Chosen:
    """Tokens for logits [n, V] by samplers of one kind."""
    first = picks[0].sampler
    if _takes_best(picks) and not first.top:
        best = best_tokens(logits)
        return Chosen(best.tokens, best.logprobs, logits, best.total)
    scores = _penalized(logits.astype(mx.float32), picks)
    for processor in first.processors:
        tokens = picks[0].history.tokens
        assert tokens is not None, "processors are given the tokens"
        scores = processor(tokens, scores)
    allowed = _stacked([pick.allowed for pick in picks])
    if allowed is not None:
        scores = mx.where(allowed, scores, -mx.inf)
    drawn_from = count_ranked(first.parameters, first.vocab_size) if first.foreign is None else 0
    ranked = top_tokens(scores, max(drawn_from, first.top)) if drawn_from or first.top else None
    total = mx.logsumexp(scores, axis=-1, keepdims=True) if ranked is None else ranked.total
    chosen = _drawn(scores, picks, ranked) if first.foreign is None else first.checked(first.foreign(scores - total))
    logprobs = (mx.take_along_axis(scores, chosen[:, None], axis=-1) - total)[:, 0]
    top: tuple[mx.array, ...] = ()
    if ranked is not None and first.top:
        top = ranked.tokens[:, : first.top], ranked.scores[:, : first.top] - total
    return Chosen(chosen, logprobs, scores, total, top)


def _guessed(logits: mx.array, picks: Sequence[Pick]) -> mx.array:
    part = picks[0].part
    if _takes_best(picks):
        places = best_tokens(logits).tokens
    else:
        scores = _penalized(logits.astype(mx.float32), picks)
        places = mx.argmax(scores, axis=-1) if picks[0].sampler.is_foreign else _drawn(scores, picks)
    return places if part is None else part.ids(places)


def _takes_best(picks: Sequence[Pick]) -> bool:
    """Whether the tokens of samplers of one kind are simply the likeliest ones."""
    (sampler, history, allowed, _), parameters = picks[0], picks[0].sampler.parameters
    changed = (sampler.bias, history.present, history.counts, history.repeated, allowed)
    return parameters.temperature == 0 and not sampler.is_foreign and all(change is None for change in changed)


def _drawn(scores: mx.array, picks: Sequence[Pick], top: Top | None = None) -> mx.array:
    places = [Place(pick.sampler.seed, pick.history.written) for pick in picks]
    first, part = picks[0].sampler, picks[0].part
    spared = _stacked([pick.sampler.spared for pick in picks], part)
    return drawn(scores, first.parameters, places, spared, vocab_size=first.vocab_size, part=part, top=top)


def _penalized(scores: mx.array, picks: Sequence[Pick]) -> mx.array:
    parameters, part = picks[0].sampler.parameters, picks[0].part
    bias = _stacked([pick.sampler.bias for pick in picks], part)
    present = _stacked([pick.history.present for pick in picks], part)
    counts = _stacked([pick.history.counts for pick in picks], part)
    repeated = _stacked([pick.history.repeated for pick in picks], part)
    if bias is not None:
        scores = scores + bias
    if repeated is not None:
        penalty = parameters.repetition_penalty
        scores = mx.where(repeated, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
    if counts is not None:
        scores = scores - parameters.frequency_penalty * counts
    return scores if present is None else scores - present


def _stacked(rows: Sequence[mx.array | None], part: Part | None = None) -> mx.array | None:
    """[1, V] each as [n, V], or what they are for a part of the vocabulary; None where there are none."""
    found = [row if part is None else part.of(row) for row in rows if row is not None]
    return None if not found else found[0] if len(found) == 1 else mx.concatenate(found)


def _dense_bias(biases: Mapping[int, float], vocab_size: int) -> mx.array:
    dense = np.zeros((1, vocab_size), np.float32)
    for token, bias in biases.items():
        if token >= vocab_size:
            raise PromptError(f"logit_bias names token {token}; this vocabulary ends with {vocab_size - 1}.")
        dense[0, token] = bias
    return mx.array(dense)


def _fresh_seed() -> int:
    """From `mx.random`, whose state MLX starts alike in each thread: outside the main one the system gives another."""
    if threading.current_thread() is not threading.main_thread():
        return secrets.randbelow(2**31 - 1)
    seed = mx.random.randint(0, 2**31 - 1).item()
    assert isinstance(seed, int), "randint draws integers"
    return seed
