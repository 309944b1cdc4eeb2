"""Rules that an answer keeps while it is written: each says what must come next, and what may."""

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import mlx.core as mx

from mlx_qwen.answer.reasoning import THINK_END
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.prompt.processor import Processor

# As the chat template itself closes a block: nothing is put into the model's mouth.
_CLOSING = f"\n{THINK_END}\n\n"


class Rule(Protocol):
    """What steers one answer; asked on the host, once a token, while the device computes."""

    def forced(self) -> int | None:
        """The token that must come next; None while there is a choice."""

    def allowed(self) -> mx.array | None:
        """Which tokens may come next, bool [1, V]; None for all."""

    def saw(self, token: int) -> None:
        """Takes note of a token that the answer now holds."""

    def fork(self) -> "Rule":
        """The same rule at the same place, which goes on by itself."""

    @property
    def failure(self) -> MLXQwenError | None:
        """Why the answer cannot go on; None as long as it can."""


class Rules:
    """The rules of one answer; the first that forces a token decides."""

    def __init__(self, rules: Sequence[Rule] = (), *, constrain: bool = False) -> None:
        self._rules = tuple(rules)
        # Whether `allowed` may say something, for which the tokens before have to be known on the host.
        self.constrain = constrain

    @property
    def failure(self) -> MLXQwenError | None:
        """Why the answer cannot go on; None as long as it can."""
        return next((rule.failure for rule in self._rules if rule.failure is not None), None)

    def forced(self) -> int | None:
        """See `Rule.forced`."""
        return next((token for rule in self._rules if (token := rule.forced()) is not None), None)

    def allowed(self) -> mx.array | None:
        """See `Rule.allowed`; what all rules allow."""
        both: mx.array | None = None
        for rule in self._rules:
            mask = rule.allowed()
            both = mask if both is None or mask is None else both & mask
        return both

    def saw(self, token: int) -> None:
        """See `Rule.saw`."""
        for rule in self._rules:
            rule.saw(token)

    def allowed_behind(self, tokens: Sequence[int]) -> list[mx.array | None]:
        """What `allowed` would say after each of the tokens, if they came; nothing is noted.

        Behind a token that is not allowed itself, nothing is said.
        """
        ahead = Rules([rule.fork() for rule in self._rules])
        masks: list[mx.array | None] = []
        for token in tokens:
            ahead.saw(token)
            masks.append(None if ahead.failure else ahead.allowed())
        return masks


class ThinkingBudget:
    """Counts reasoning tokens and, past `budget`, supplies the tokens that close the block, so that an answer follows.

    Only tokens between `<think>` and `</think>` count. `inside`: whether the prompt already opened the block.
    """

    failure: MLXQwenError | None = None

    def __init__(self, budget: int, *, thinking: tuple[int, int], closing: Sequence[int], inside: bool) -> None:
        self._left = budget
        self._start, self._end = thinking
        self._closing = list(closing)
        self._inside = inside
        self._coming: list[int] = []
        if inside and budget == 0:
            self._close()

    @classmethod
    def for_prompt(cls, budget: int | None, processor: Processor, *, inside: bool) -> "ThinkingBudget | None":
        """The budget of one answer, None without a limit; PromptError when the vocabulary has no think tokens."""
        if budget is None:
            return None
        if processor.thinking is None:
            raise PromptError("thinking_budget needs a model that thinks: this tokenizer has no <think> and </think>.")
        return cls(budget, thinking=processor.thinking, closing=processor.encode(_CLOSING), inside=inside)

    def fork(self) -> "ThinkingBudget":
        """The same budget, spent as far, which goes on by itself."""
        other = copy(self)
        other._coming = list(self._coming)
        return other

    def forced(self) -> int | None:
        """The next of the closing tokens; None while the model is free to choose."""
        return self._coming[0] if self._coming else None

    def allowed(self) -> mx.array | None:
        """All tokens."""
        return None

    def saw(self, token: int) -> None:
        """Takes note of a token that the answer now holds."""
        if self._coming:
            self._coming.pop(0)
            if token == self._end:
                self._inside = False
            return
        if token == self._start:
            self._inside = True
        elif token == self._end:
            self._inside = False
        elif self._inside:
            self._left -= 1
        if self._inside and self._left <= 0:
            self._close()

    def _close(self) -> None:
        self._coming = list(self._closing)
