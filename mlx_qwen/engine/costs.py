"""What passes cost here and now, by how many drafts they verify."""

from collections import deque
from collections.abc import Sequence
from statistics import median

from mlx_qwen.engine.depth import MOST_DRAFTS, stated_costs

# How many of the last passes of a kind tell its cost, and how many of all passes later they are forgotten for new ones.
_KEPT = 7
_FRESH = 64


class Costs:
    """Seconds of the last passes of each kind: of so many rows, with so many drafts from this or that drafter."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, str, int], deque[float]] = {}
        self._seen: dict[tuple[int, str, int], int] = {}
        self._passes = 0
        self._before: tuple[int, int] | None = None

    def saw(self, rows: int, drafter: str, depth: int, seconds: float) -> None:
        """Note a pass of `rows` rows with `depth` drafts.

        A pass without drafts ends while the next one runs. So the pass that follows it waits for that one first, and
        one without drafts that follows drafts waits for none, and tells nothing.
        """
        before, self._before = self._before, (rows, depth)
        self._passes += 1
        if depth == 0 and before != (rows, 0):
            return
        if depth and before == (rows, 0):
            plain = self._median(rows, "", 0)
            if plain is None:
                return
            seconds = max(0.0, seconds - plain)
        held = self._seconds.get(kind := (rows, drafter if depth else "", depth))
        if held is None:
            # The first of its kind is built anew: that says nothing about others.
            self._seconds[kind] = deque(maxlen=_KEPT)
        else:
            if self._passes - self._seen[kind] > _FRESH:
                held.clear()
            held.append(seconds)
        self._seen[kind] = self._passes

    def interrupted(self) -> None:
        """Note that something else was computed, which waited for all that ran."""
        self._before = None

    def of(self, rows: int, drafter: str, *, draft: float) -> Sequence[float] | None:
        """The cost of a pass with 0 to 7 drafts; None while nobody knows that of one without.

        What was not seen lies on a line with what was; before any drafts were, it is as stated for guesses of `draft`.
        """
        plain = self._median(rows, "", 0)
        if plain is None:
            return None
        known = {0: plain}
        for depth in range(1, MOST_DRAFTS + 1):
            seconds = self._median(rows, drafter, depth)
            if seconds is not None:
                known[depth] = seconds
        if len(known) == 1:
            return [plain * cost for cost in stated_costs(draft)]
        return [_on_line(known, depth) for depth in range(MOST_DRAFTS + 1)]

    def _median(self, rows: int, drafter: str, depth: int) -> float | None:
        held = self._seconds.get((rows, drafter, depth))
        return median(held) if held else None


def _on_line(known: dict[int, float], depth: int) -> float:
    """The cost of `depth` drafts: known, between its known neighbours, or beyond the last one as it lies from none."""
    if depth in known:
        return known[depth]
    below = max(each for each in known if each < depth)
    above = min((each for each in known if each > depth), default=None)
    first, last = (0, below) if above is None else (below, above)
    return known[below] + (depth - below) * (known[last] - known[first]) / (last - first)
