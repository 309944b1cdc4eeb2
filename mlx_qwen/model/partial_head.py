"""A part of the vocabulary that drafts are chosen from, and the rows of the output head that it needs.

Tokenizers that merge pairs number their tokens by how early a pair was merged, so that the first ones make up most of
a text, and put special tokens behind all others. Both are runs of the head's rows, whose views need no memory.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.model.layers import AnyEmbedding, AnyLinear, rows_of


class Part(NamedTuple):
    """The tokens [0, low) and [high, end) of a vocabulary, in this order; `high` is not below `low`."""

    low: int
    high: int
    end: int

    @property
    def size(self) -> int:
        """How many tokens these are."""
        return self.low + self.end - self.high

    def of(self, values: mx.array) -> mx.array:
        """What values [..., vocab_size] are for these tokens: [..., size]."""
        low = values[..., : self.low]
        return low if self.high == self.end else mx.concatenate([low, values[..., self.high : self.end]], axis=-1)

    def of_wider(self, wider: "Part", values: mx.array) -> mx.array:
        """What values [..., wider.size] of a part with more low tokens are for these: [..., size]."""
        return values if wider == self else Part(self.low, wider.low, wider.size).of(values)

    def ids(self, places: mx.array) -> mx.array:
        """The ids of the tokens at `places` of this part, uint32 as these."""
        return places if self.high == self.end else _ids(self)[places]


@lru_cache(maxsize=32)
def _ids(part: Part) -> mx.array:
    ids = mx.concatenate([mx.arange(part.low), mx.arange(part.high, part.end)]).astype(mx.uint32)
    mx.eval(ids)
    return ids


class PartialHead:
    """Rows of a head that is whole in this process, as views."""

    def __init__(self, head: AnyLinear | AnyEmbedding) -> None:
        self._head, self._weight = head, head.weight
        self._views: dict[tuple[int, int], Callable[[mx.array], mx.array]] = {}

    def holds(self, head: AnyLinear | AnyEmbedding) -> bool:
        """Whether its rows are those of this head, as it is now."""
        return head is self._head and head.weight is self._weight

    def __call__(self, x: mx.array, part: Part) -> mx.array:
        """[..., hidden_size] to the logits of a part, [..., part.size]."""
        runs = [(0, part.low), (part.high, part.end)]
        logits = [self._rows(*run)(x) for run in runs if run[0] < run[1]]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits, axis=-1)

    def _rows(self, first: int, last: int) -> Callable[[mx.array], mx.array]:
        if (first, last) not in self._views:
            view = rows_of(self._head, first, last)
            self._views[first, last] = (
                view.as_linear if isinstance(view, nn.Embedding | nn.QuantizedEmbedding) else view
            )
        return self._views[first, last]
