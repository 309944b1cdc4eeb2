"""Whether all ranks do the same: what each has written after each turn, and when."""

from collections import deque
from collections.abc import Sequence as Listed
from hashlib import blake2b
from threading import Lock
from time import monotonic
from typing import NamedTuple

from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.errors import MLXQwenError

# Seconds that a turn may be over on one rank and not on another, and that one may take on all of them.
LAG, LONGEST = 7.0, 300.0
# How many times as long as the longest of the last ones something may take beside that lag, and of how many.
_TIMES, _LAST, _LEAST = 8.0, 16, 4
# Seconds without work after which a machine may have put the weights aside.
_IDLE = 10.0


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


class Work(NamedTuple):
    """Something that all ranks compute at once: so many tokens of a prompt, or of answers.

    `foreseen` says whether it takes about as long a token as others did: not where a picture is first seen.
    """

    is_prompt: bool
    tokens: int
    foreseen: bool = True


class Patience:
    """How long something may take, by how long the last ones of its kind took; it learns nothing from a first time."""

    def __init__(self) -> None:
        self._took: dict[bool, deque[tuple[int, float]]] = {kind: deque(maxlen=_LAST) for kind in (False, True)}
        self._work: Work | None = None
        self._began, self._ended = 0.0, float("-inf")

    def began(self, work: Work | None) -> None:
        """Note what is computed from now on; None for what nothing is known of."""
        now = monotonic()
        awake = work is not None and work.foreseen and now - self._ended < _IDLE
        self._work, self._began = work if awake else None, now

    def ended(self) -> None:
        """Note that it came to an end."""
        now = monotonic()
        if self._work is not None:
            self._took[self._work.is_prompt].append((self._work.tokens, now - self._began))
        self._work, self._ended = None, now

    def seconds(self) -> float:
        """How long the present work may take."""
        took = () if self._work is None else self._took[self._work.is_prompt]
        if self._work is None or len(took) < _LEAST:
            return LONGEST
        longest = max(seconds * max(self._work.tokens / tokens, 1.0) for tokens, seconds in took)
        return min(LAG + _TIMES * longest, LONGEST)


class Pace:
    """Compares the steps of `count` ranks, each of which reports them in order."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lock = Lock()
        self._open: dict[int, dict[int, Step]] = {}
        self._since: dict[int, float] = {}
        self._taken = [0] * count
        self._began: float | None = None
        self._patience = Patience()
        self._trouble: str | None = None

    def began(self, work: Work | None = None) -> None:
        """Note that a turn is being taken from now on, or this work in it."""
        with self._lock:
            self._began = monotonic()
            self._patience.began(work)

    def ended(self) -> None:
        """Note that the work came to an end on this rank, and with it on all that it waits for."""
        with self._lock:
            self._began = monotonic()
            self._patience.ended()

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
            most = self._patience.seconds()
            if began is not None and now - began > most:
                return f"no rank has finished a step for {most:.0f} s: a connection between two of them may be dead"
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
