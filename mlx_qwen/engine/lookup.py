"""Prompt lookup: guesses copied from the text so far, from behind the last place where its end stood before.

Source: Saxena (2023), "Prompt lookup decoding".
"""

from collections.abc import Sequence

from mlx_qwen.engine.depth import Drafts

# How many tokens have to stand there as they stand at the end.
GRAM = 3


class Lookup:
    """Copies for one answer, and how well that goes."""

    def __init__(self, drafts: Drafts) -> None:
        self.drafts = drafts
        self._tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}

    @property
    def length(self) -> int:
        """How many tokens of the text are known."""
        return len(self._tokens)

    def saw(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            end = len(self._tokens)
            if end >= GRAM:
                self._behind[tuple(self._tokens[end - GRAM :])] = end
            self._tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """The `count` tokens that may come behind the text; none where its end stands nowhere before.

        A copy that reaches the end of the text goes on with itself, as repetitions do.
        """
        place = self._behind.get(tuple(self._tokens[-GRAM:]))
        if place is None:
            return []
        copied = self._tokens[place : place + count]
        while len(copied) < count:
            copied.append(copied[place + len(copied) - len(self._tokens)])
        return copied
