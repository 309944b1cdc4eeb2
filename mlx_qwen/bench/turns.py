"""Fair timing: the candidates take turns, so that whatever else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable, Mapping

OURS, PEER = "mlx-qwen", "mlx-lm"


Candidates = Mapping[str, Callable[[], object]]


def median_times(candidates: Candidates, repeats: int, *, after: Candidates | None = None) -> dict[str, float]:
    """Median seconds of each candidate over `repeats` turns, after one untimed turn; `after` is run untimed."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - started)
            if after is not None:
                after[name]()
    return {name: statistics.median(values) for name, values in times.items()}
