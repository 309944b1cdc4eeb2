"""From how much of a vocabulary drafts are chosen: from as much as gives most tokens for what a guess costs.

Source: Zhao et al. (2025), "FR-Spec: accelerating large-vocabulary language models via frequency-ranked speculative
sampling", for drafts from a part of the vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_qwen.config import MoEConfig
from mlx_qwen.engine.depth import DRAFT_COST, FIRST_CHANCE, ROW_COST
from mlx_qwen.model.partial_head import Part

# How many of the last tokens tell of the next ones, and how many of each part's own are taken for seen beside them.
WINDOW, _UNSEEN = 256, 2
# By what part of the vocabulary a part grows, and how many rows of the head go together.
_PARTS, _ALIGNED = 8, 64
# Below so many tokens the head costs too little to be divided.
_LEAST_DIVIDED = 1 << 16


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """The tokens that one answer's drafts may be: all special ones, and as many of the first as pay.

    Attributes:
        size: how many tokens there are.
        special: the run of special tokens, first and behind the last; empty where they stand apart.
        fixed: how many of the first ones; None for as many as pay by the text's last tokens.
    """

    size: int
    special: tuple[int, int]
    fixed: int | None = None

    def part(self, text: Sequence[int], head_share: float) -> Part | None:
        """The part for an answer whose text ends with `text`; None where all tokens are best.

        `head_share` is what the head takes of a guess's bytes. The choice follows from the text alone, so that the
        same request guesses the same.
        """
        if self.fixed is not None:
            return self._part(self.fixed)
        if self.size < _LEAST_DIVIDED:
            return None
        tokens = np.array(text, np.int64)
        ordinary = tokens[(tokens < self.special[0]) | (tokens >= self.special[1])]
        best, most = None, self._rate(1.0, None, head_share)
        for number in range(1, _PARTS):
            part = self._part(self.size * number // _PARTS)
            seen = int((ordinary < part.low).sum()) if part is not None else 0
            rate = self._rate((seen + _UNSEEN) / (len(ordinary) + _UNSEEN), part, head_share)
            if rate > most:
                best, most = part, rate
        return best

    def cost(self, part: Part | None, head_share: float) -> float:
        """What a guess from a part costs beside a decoded token."""
        spared = 0.0 if part is None else 1 - part.size / self.size
        return DRAFT_COST * (1 - head_share * spared)

    def _rate(self, share: float, part: Part | None, head_share: float) -> float:
        """Tokens for the cost of a pass with two guesses, where a part holds this share of the tokens to come."""
        chance = FIRST_CHANCE * share
        return (1 + chance + chance**2) / (1 + 2 * (ROW_COST + self.cost(part, head_share)))

    def _part(self, low: int) -> Part | None:
        low = -(-low // _ALIGNED) * _ALIGNED
        first, end = self.special
        return Part(low, max(first, low), max(end, low)) if low < self.size else None


def special_run(ids: Collection[int]) -> tuple[int, int]:
    """The run of consecutive ids that ends with the last of special tokens' `ids`, as first and behind the last."""
    end = first = max(ids, default=-1) + 1
    while first - 1 in ids:
        first -= 1
    return first, end


def head_share(head: nn.Module, read: nn.Module | Sequence[nn.Module], moe: MoEConfig | None) -> float:
    """What the head takes of the bytes that a guess reads: it, and the layers `read`, with those experts it asks."""
    beside = [read] if isinstance(read, nn.Module) else read
    others = sum(_nbytes(array, moe) for one in beside for array in _arrays(one))
    own = sum(array.nbytes for array in _arrays(head))
    return own / max(1, own + others)


def _arrays(module: nn.Module) -> list[mx.array]:
    held: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return [array for _, array in held]


def _nbytes(array: mx.array, moe: MoEConfig | None) -> float:
    """What a token reads of an array: of experts, as many as are chosen."""
    if moe is None or array.ndim < 3 or array.shape[0] != moe.num_experts:
        return array.nbytes
    return array.nbytes * moe.num_experts_per_tok / moe.num_experts
