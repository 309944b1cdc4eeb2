"""Keeps an answer to a grammar: which tokens may come next, asked of llguidance on the host while the device computes.

The tables that tell which tokens fit where are made once a tokenizer and kept. Source: https://github.com/guidance-ai/llguidance.
"""

from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future
from copy import copy
from functools import cached_property
from threading import Lock, Thread
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.prompt.processor import Processor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MISSING = "A schema, regex, grammar or choice of tools needs llguidance. Install it: pip install 'mlx-qwen[grammar]'."
_making = Lock()
# By the size of the vocabulary too: models may pad one tokenizer differently.
_tables: "WeakKeyDictionary[Processor, dict[int, Future[LLTokenizer]]]" = WeakKeyDictionary()


def check_installed() -> None:
    """Raises PromptError, with what to install, where llguidance is missing."""
    try:
        import llguidance  # noqa: F401
    except ImportError as error:
        raise PromptError(_MISSING) from error


def begin_tables(processor: Processor, vocab_size: int) -> "Future[LLTokenizer]":
    """The tables of a tokenizer, made in a thread of their own unless they are there.

    For 248,000 tokens this takes seconds, in which no other Python code runs either: a server that will need them asks
    for them before it listens. Raises PromptError without llguidance, or without a token that ends an answer.
    """
    check_installed()
    from llguidance import LLTokenizer

    if not processor.end_token_ids:
        raise PromptError("A grammar needs a token that ends the answer, and this tokenizer has none.")
    with _making:
        by_size = _tables.setdefault(processor, {})
        if vocab_size not in by_size:
            made: Future[LLTokenizer] = Future()
            ends = sorted(processor.end_token_ids)

            def make(described: str = processor.tokenizer.to_str()) -> None:
                try:
                    made.set_result(LLTokenizer(described, n_vocab=vocab_size, eos_token=ends))
                except Exception as error:
                    wrong = PromptError(f"No grammar can be followed with this tokenizer: {_first_lines(str(error))}")
                    made.set_exception(wrong)

            by_size[vocab_size] = made
            Thread(target=make, name="mlx-qwen grammar tables", daemon=True).start()
        return by_size[vocab_size]


def matcher_of(grammar: str, processor: Processor, vocab_size: int, *, what: str) -> "LLMatcher":
    """What follows an answer through `grammar`, which is llguidance's own; `what` names it in errors.

    Raises PromptError for a grammar that cannot be enforced, or that accepts nothing.
    """
    tables = begin_tables(processor, vocab_size).result()
    from llguidance import LLMatcher

    matcher = LLMatcher(tables, grammar, log_level=0)
    if matcher.is_error():
        raise PromptError(f"{what} cannot be enforced: {_first_lines(matcher.get_error())}")
    tokens = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    tokens[list(processor.end_token_ids)] = 0
    if not tokens.any() and not matcher.is_accepting():
        raise PromptError(f"{what} accepts no answer at all. Loosen what contradicts itself.")
    return matcher


def _first_lines(error: str) -> str:
    return " ".join(line.strip() for line in error.strip().splitlines()[:4])


class Grammar:
    """A rule: behind the reasoning, only what a matcher accepts, then an end token.

    Args:
        matcher: at its start.
        spell: tokens for bytes.
        vocab_size: V, padding included.
        end_token_ids: any of these ends the answer.
        thinking: the tokens that open and close a think block; None where the vocabulary has none.
        inside: whether the prompt already opened the block.
        opening: what comes between the block and the answer, as the chat template writes it.
        trigger: the token that `matcher` begins with, and before and after which all is free; None where the whole
            answer is to match.
        avoided: tokens that must not come inside the reasoning, such as end tokens: an answer follows it.
    """

    def __init__(
        self,
        matcher: "LLMatcher",
        *,
        spell: Callable[[bytes], list[int]],
        vocab_size: int,
        end_token_ids: Set[int],
        thinking: tuple[int, int] | None,
        inside: bool,
        opening: Sequence[int] = (),
        trigger: int | None = None,
        avoided: Sequence[int] = (),
    ) -> None:
        self._start, self._spell = matcher, spell
        self._ends = end_token_ids
        self._thinking = thinking or (-1, -1)
        self._inside = inside and thinking is not None
        self._opening, self._trigger = list(opening), trigger
        self._coming: list[int] = []
        self._matcher = None if self._inside or trigger is not None else matcher.deep_copy()
        self._masks = Masks(vocab_size, [*end_token_ids], avoided)
        self.failure: MLXQwenError | None = None

    def forced(self) -> int | None:
        """The next token between the reasoning and the answer; None elsewhere."""
        return self._coming[0] if self._coming else None

    def allowed(self) -> mx.array | None:
        """Which tokens the grammar accepts next, bool [1, V]; end tokens where it accepts the answer as it is."""
        if self._inside:
            return self._masks.reasoning
        if self._coming or self._matcher is None:
            return None
        words = np.zeros(self._masks.words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        self._check(self._matcher)
        if np.count_nonzero(words) == 1:
            self._respell(self._matcher, words)
        return self._masks.expanded(words) if words.any() else self._masks.ending

    def saw(self, token: int) -> None:
        """Takes note of a token that the answer now holds."""
        if self._coming:
            self._coming.pop(0)
        elif self._matcher is not None:
            self._match(self._matcher, token)
        elif token == self._thinking[1] and self._inside:
            self._inside = False
            if self._trigger is None:
                self._coming, self._matcher = list(self._opening), self._start.deep_copy()
        elif token == self._thinking[0]:
            self._inside = True
        elif token == self._trigger and not self._inside:
            self._matcher = self._start.deep_copy()
            self._match(self._matcher, token)

    def fork(self) -> "Grammar":
        """The same rule at the same place, which goes on by itself."""
        other = copy(self)
        other._coming = list(self._coming)
        other._matcher = None if self._matcher is None else self._matcher.deep_copy()
        return other

    def _match(self, matcher: "LLMatcher", token: int) -> None:
        if token in self._ends:
            return
        matcher.consume_token(token)
        self._check(matcher)
        if self._trigger is not None and matcher.is_stopped():
            self._matcher = None

    def _respell(self, matcher: "LLMatcher", words: np.ndarray) -> None:
        """Where one text is forced that spells a special token, offer its first letter instead.

        llguidance 1.9 offers the special token there, and takes only the spelling.
        """
        place = int(np.flatnonzero(words)[0])
        word = int(words[place]) & 0xFFFFFFFF
        token = 32 * place + word.bit_length() - 1
        if word & (word - 1) or token in self._ends or matcher.validate_tokens([token]):
            return
        words[:] = 0
        for first in self._spell(matcher.compute_ff_bytes()[:1])[:1]:
            words.view(np.uint8)[first // 8] = 1 << first % 8

    def _check(self, matcher: "LLMatcher") -> None:
        if matcher.is_error():
            self.failure = MLXQwenError(
                f"The grammar could not be followed any further: {_first_lines(matcher.get_error())} "
                "Simplify it, or leave it out."
            )


class Without:
    """A rule: tokens that never come."""

    failure: MLXQwenError | None = None

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._masks = Masks(vocab_size, (), tokens)

    def forced(self) -> int | None:
        """None: there is always a choice."""
        return None

    def allowed(self) -> mx.array | None:
        """All other tokens, bool [1, V]."""
        return self._masks.reasoning

    def saw(self, token: int) -> None:
        """Nothing changes."""

    def fork(self) -> "Without":
        """Itself."""
        return self


class Masks:
    """Masks of tokens, bool [1, V], made where they are used: arrays belong to the thread that computes."""

    def __init__(self, vocab_size: int, ends: Sequence[int], avoided: Sequence[int]) -> None:
        self.words = (vocab_size + 31) // 32
        self._size, self._ends, self._avoided = vocab_size, list(ends), list(avoided)

    @cached_property
    def reasoning(self) -> mx.array | None:
        """All tokens but those that are avoided; None for all."""
        return ~self._of(self._avoided) if self._avoided else None

    @cached_property
    def ending(self) -> mx.array:
        """The end tokens."""
        return self._of(self._ends)

    def expanded(self, words: np.ndarray) -> mx.array:
        """A mask from its bits, int32 [V / 32]: only these go to the device."""
        packed = mx.array(words.view(np.uint8))
        bits = (packed[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1
        return bits.astype(mx.bool_).reshape(1, -1)[:, : self._size]

    def _of(self, tokens: Sequence[int]) -> mx.array:
        mask = np.zeros((1, self._size), np.bool_)
        mask[0, list(tokens)] = True
        return mx.array(mask)
