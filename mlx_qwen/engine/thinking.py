"""Reasoning under control: counted, and closed for the model by its budget or when it goes round in a circle."""

from collections.abc import Sequence
from copy import copy

import mlx.core as mx

from mlx_qwen.answer.deltas import ClosedBy
from mlx_qwen.answer.reasoning import THINK_END
from mlx_qwen.engine.loops import Loops
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.prompt.processor import Processor

# As the chat template itself closes a block: nothing is put into the model's mouth.
_CLOSING = f"\n{THINK_END}\n\n"


class Thinking:
    """A rule: past `budget` tokens of reasoning, or in a loop, the tokens come that close the block; an answer follows.

    Only tokens between `<think>` and `</think>` count, and only those that the model chose.

    Args:
        budget: most tokens of reasoning; None for any number.
        thinking: the tokens that open and close a block.
        closing: what is written to close one.
        inside: whether the prompt already opened the block.
        loops: finds loops; None to let them be.

    Attributes:
        spent: tokens of reasoning so far.
        closed_by: why a block was closed for the model.
    """

    failure: MLXQwenError | None = None

    def __init__(
        self,
        budget: int | None,
        *,
        thinking: tuple[int, int],
        closing: Sequence[int],
        inside: bool,
        loops: Loops | None = None,
    ) -> None:
        self.spent = 0
        self.closed_by: ClosedBy | None = None
        self._budget = budget
        self._start, self._end = thinking
        self._closing = list(closing)
        self._inside = inside
        self._loops = loops
        self._coming: list[int] = []
        if inside and budget == 0:
            self._close("budget")

    @classmethod
    def of(cls, processor: Processor, budget: int | None, *, inside: bool, loops: bool) -> "Thinking | None":
        """The rule of one answer; None for a vocabulary without think tokens, PromptError where that gets a budget."""
        if processor.thinking is not None:
            closing, found = processor.encode(_CLOSING), Loops() if loops else None
            return cls(budget, thinking=processor.thinking, closing=closing, inside=inside, loops=found)
        if budget is None:
            return None
        raise PromptError("thinking_budget needs a model that thinks: this tokenizer has no <think> and </think>.")

    def fork(self) -> "Thinking":
        """The same rule at the same place, which goes on by itself."""
        other = copy(self)
        other._coming = list(self._coming)
        other._loops = self._loops and self._loops.fork()
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
        circles = False
        if token in (self._start, self._end):
            self._inside = token == self._start
        elif self._inside:
            self.spent += 1
            circles = self._loops is not None and self._loops.saw(token)
        if self._inside and self._budget is not None and self.spent >= self._budget:
            self._close("budget")
        elif self._inside and circles:
            self._close("loop")

    def _close(self, why: ClosedBy) -> None:
        self._coming, self.closed_by = list(self._closing), why
