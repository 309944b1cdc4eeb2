"""Ends reasoning that goes on for too long, so that an answer still follows."""

from collections.abc import Sequence

from mlx_qwen.answer.reasoning import THINK_END
from mlx_qwen.errors import PromptError
from mlx_qwen.prompt.processor import Processor

# As the chat template itself closes a block: nothing is put into the model's mouth.
_CLOSING = f"\n{THINK_END}\n\n"


class ThinkingBudget:
    """Counts reasoning tokens and, past `budget`, supplies the tokens that close the block.

    Only tokens between `<think>` and `</think>` count. `inside`: whether the prompt already opened the block.
    """

    def __init__(self, budget: int, *, thinking: tuple[int, int], closing: Sequence[int], inside: bool) -> None:
        self._left = budget
        self._start, self._end = thinking
        self._closing = list(closing)
        self._inside = inside
        self._forced: list[int] = []
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

    def next_token(self) -> int | None:
        """The token that must come next; None while the model is free to choose."""
        return self._forced.pop(0) if self._forced else None

    def saw(self, token: int) -> None:
        """Takes note of a token that the answer now holds."""
        if token == self._start:
            self._inside = True
        elif token == self._end:
            self._inside = False
        elif self._inside and not self._forced:
            self._left -= 1
        if self._inside and not self._forced and self._left <= 0:
            self._close()

    def _close(self) -> None:
        self._forced = list(self._closing)
