"""Finds text that goes round in a circle, word for word."""

from copy import copy

import numpy as np

# The longest block, in tokens, whose repetition is noticed.
_LONGEST = 512
# How many tokens must only repeat what stood one block before. Rows of zeros are written on purpose: blocks of few
# different tokens have to go on for longer.
_LEAST, _LEAST_OF_FEW, _FEW = 256, 1024, 8
# How often, beside the first time, a block must come again.
_TIMES = 3


class Loops:
    """Follows tokens and says when they have repeated one block for so long that nobody does so on purpose.

    One comparison a token for each length that a block may have: the work grows with the text and no faster.
    """

    def __init__(self) -> None:
        self._before = np.full(_LONGEST, -1, np.int64)
        self._runs = np.zeros(_LONGEST, np.int64)
        self._needed = np.maximum(_LEAST, _TIMES * np.arange(1, _LONGEST + 1))

    def saw(self, token: int) -> bool:
        """Takes the next token; whether the text goes round in a circle by now."""
        self._runs = np.where(self._before == token, self._runs + 1, 0)
        self._before[1:] = self._before[:-1]
        self._before[0] = token
        found = np.flatnonzero(self._runs >= self._needed)
        if not found.size:
            return False
        block = self._before[: found[0] + 1]
        return len(set(block.tolist())) >= _FEW or bool(self._runs[found[0]] >= _LEAST_OF_FEW)

    def fork(self) -> "Loops":
        """The same at the same place, which goes on by itself."""
        other = copy(self)
        other._before = self._before.copy()
        return other
