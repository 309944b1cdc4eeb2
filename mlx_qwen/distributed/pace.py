"""Whether all ranks do the same: what each has written after each turn, and when."""

from collections.abc import Sequence as Listed
from hashlib import blake2b
from threading import Lock
from time import monotonic
from typing import NamedTuple

from mlx_qwen.engine.sequence import Emission, Sequence
from mlx_qwen.errors import MLXQwenError

# Seconds that a turn may be over on one rank and not on another, and that one may take on all of them.
LAG, LONGEST = 7.0, 300.0


class Step(NamedTuple):
    """What a rank knows after a turn: a digest of all that was written so far, and why it failed, or ""."""

    digest: str
    failure: str = ""


class Record:
    """Makes the steps of one rank from what its turns give."""

    def __init__(self) -> None:
        self._digest = blake2b(digest_size=8)

    def step(self, outgoing: Listed[tuple[Sequence, Emission | BaseException | None]], also: str = "") -> Step:
        """The step of a turn that gave `outgoing`; `also` has to be the same on all ranks too."""
        failure = ""
        for sequence, item in outgoing:
            said = f"{item.token} {item.from_draft}" if isinstance(item, Emission) else type(item).__name__
            self._digest.update(f"{sequence.number} {said}\n".encode())
            if isinstance(item, BaseException) and not isinstance(item, MLXQwenError):
                failure = f"{type(item).__name__}: {item}"
        self._digest.update(also.encode())
        return Step(self._digest.hexdigest(), failure)


class Pace:
    """Compares the steps of `count` ranks, each of which reports them in order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = Lock()
        self._open: dict[int, dict[int, Step]] = {}
        self._since: dict[int, float] = {}
        self._taken = [0] * count
        self._began: float | None = None
        self._trouble: str | None = None

    def began(self) -> None:
        """Note that a turn is being taken from now on."""
        self._began = monotonic()

    def took(self, rank: int, step: Step) -> None:
        """Note a rank's next step."""
        with self._lock:
            number = self._taken[rank]
            self._taken[rank] += 1
            steps = self._open.setdefault(number, {})
            steps[rank] = step
            self._since.setdefault(number, monotonic())
            if rank == 0:
                self._began = None
            if len(steps) == self._count:
                self._compare(self._open.pop(number))
                del self._since[number]

    def trouble(self) -> str | None:
        """Why the ranks cannot go on; None as long as they can."""
        with self._lock:
            if self._trouble is not None:
                return self._trouble
            now, began = monotonic(), self._began
            number = min(self._open, default=None)
            if number is not None and now - self._since[number] > LAG:
                steps = self._open[number]
                late = ", ".join(f"rank {rank}" for rank in range(self._count) if rank not in steps)
                return _failed(steps) or f"{late} fell out of step: others went on {LAG:.0f} s ago"
            if began is not None and now - began > LONGEST:
                return f"no rank has finished a step for {LONGEST:.0f} s: a connection between two of them may be dead"
            return None

    def _compare(self, steps: dict[int, Step]) -> None:
        if len({step.digest for step in steps.values()}) == 1 and not _failed(steps):
            return
        others = [rank for rank, step in sorted(steps.items()) if step.digest != steps[0].digest]
        named = ", ".join(f"rank {rank}" for rank in others)
        self._trouble = (
            self._trouble
            or _failed(steps)
            or (f"{named} wrote other tokens than rank 0: their sums or their random numbers differ")
        )


def _failed(steps: dict[int, Step]) -> str:
    return next((f"rank {rank} failed: {step.failure}" for rank, step in sorted(steps.items()) if step.failure), "")
