"""How many tokens to guess ahead: as many as give most tokens for what a pass costs.

Source: Leviathan et al. (2023) for expected tokens over costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

MOST_DRAFTS = 7
# What a decoded token costs: 1. One more verified row and one more draft, as public measurements on Apple GPUs have it.
ROW_COST, DRAFT_COST = 0.3, 0.15
# The chance of a first guess before any was tried and how many tries that is worth; how fast old tries are forgotten.
FIRST_CHANCE, _UNKNOWN_WEIGHT = 0.8, 2.0
_MEMORY = 0.95
_PROBE_AFTER, _MOST_PROBE_AFTER = 16, 256


def stated_costs(draft: float = DRAFT_COST) -> list[float]:
    """What a pass with 0 to 7 drafts costs beside one without, where each guess costs `draft`."""
    return [1 + depth * (ROW_COST + draft) for depth in range(MOST_DRAFTS + 1)]


class Chooser:
    """Finds the number of drafts that gives most tokens for its cost, and tries another one now and then.

    It comes back from no drafts at all by trying one, after ever more passes. With `both_ways` neighbours of any number
    are tried, one pass each, so that what is known of their costs stays true.
    """

    def __init__(self, *, both_ways: bool = False) -> None:
        self._both_ways = both_ways
        self._best = self._idle = self._trial = self._trial_left = 0
        self._after = _PROBE_AFTER
        self._upwards = False

    def pick(self, expected: Sequence[float], costs: Sequence[float]) -> int:
        """A number of drafts, given the tokens and the cost of a pass with 0, 1, … of them."""
        if self._trial_left:
            self._trial_left -= 1
            return self._trial
        rates = [tokens / cost for tokens, cost in zip(expected, costs, strict=True)]
        best = rates.index(max(rates))
        if best != self._best:
            self._best, self._idle, self._after = best, 0, _PROBE_AFTER
        self._idle += 1
        if self._idle < self._after or not (best == 0 or self._both_ways):
            return best
        self._idle, self._after = 0, min(2 * self._after, _MOST_PROBE_AFTER)
        self._upwards = best == 0 or (not self._upwards and best < MOST_DRAFTS)
        self._trial = best + 1 if self._upwards else best - 1
        # What a pass without drafts costs shows only where another one came before it.
        self._trial_left = self._trial == 0
        return self._trial


@dataclass(slots=True)
class Drafts:
    """How many tokens one answer guesses ahead, and how well that goes: always `fixed`, or as many as pay.

    What pays is counted by what was taken so far and by `costs`, which are stated: so the number depends on the answer
    alone, and the same request is computed in the same steps. With `is_measured` whoever computes may choose the number
    by costs that were measured here and now.
    """

    fixed: int | None = 0
    costs: Sequence[float] = field(default_factory=stated_costs)
    is_measured: bool = False
    taken: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    tried: list[float] = field(default_factory=lambda: [0.0] * MOST_DRAFTS)
    all_taken: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    all_tried: list[int] = field(default_factory=lambda: [0] * MOST_DRAFTS)
    _chooser: Chooser = field(default_factory=Chooser)

    def depth(self, room: int, costs: Sequence[float] | None = None) -> int:
        """How many to guess now, at most `room`; by `costs` of a pass with 0 to 7 guesses in place of its own."""
        depth = self.fixed
        if depth is None:
            depth = self._chooser.pick(self.expected(), costs or self.costs)
        return max(0, min(depth, room))

    def saw(self, tried: int, taken: int) -> None:
        """Note that of `tried` guesses the first `taken` were right; those behind the first wrong one say nothing."""
        for i in range(min(taken + 1, tried)):
            right = i < taken
            self.taken[i] = _MEMORY * self.taken[i] + right
            self.tried[i] = _MEMORY * self.tried[i] + 1
            self.all_taken[i] += right
            self.all_tried[i] += 1

    def expected(self) -> list[float]:
        """How many tokens a pass with 0 to 7 guesses is expected to write."""
        tokens, right, chance = [1.0], 1.0, FIRST_CHANCE
        for taken, tried in zip(self.taken, self.tried, strict=True):
            # What is not known yet is taken to be as likely as at the depth before.
            chance = (taken + _UNKNOWN_WEIGHT * chance) / (tried + _UNKNOWN_WEIGHT)
            right *= chance
            tokens.append(tokens[-1] + right)
        return tokens

    def acceptance(self) -> list[float]:
        """How often the guess at each depth was right where all before it were, as far as any was tried."""
        return acceptance(self)


def acceptance(*several: Drafts) -> list[float]:
    """How often guesses at each depth were right where all before them were, of all counts together."""
    taken = (sum(counts) for counts in zip(*(one.all_taken for one in several), strict=True))
    tried = (sum(counts) for counts in zip(*(one.all_tried for one in several), strict=True))
    return [right / count for right, count in zip(taken, tried, strict=True) if count]
