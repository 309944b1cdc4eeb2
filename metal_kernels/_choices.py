"""What was found out about the kernels on this machine: which are left out, and in which variant the others run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

NEVER = 1 << 30
MOST_EXPERT_ROWS = 128
MOST_MLP_ROWS = 8


@dataclass(frozen=True)
class Choices:
    """One value for all kernels; the defaults are what runs where nothing was measured.

    Attributes:
        left_out: kernels that are not used, each with the reason.
        most_threads: threads of a threadgroup at most, by kernel; others take what suits their shapes.
        prefill_rows: rows of a head's state in a threadgroup of the gated-delta prefill, 32 or 64.
        chunked_from: tokens from which the prefill runs in chunks; `NEVER` is never.
        expert_rows: tokens up to which experts run as two kernels, at most `MOST_EXPERT_ROWS`; more are sorted.
        attention_groups: threadgroups that attention to a long context is split over, about.
        mlp_rows: tokens up to which a dense MLP's gate and up run as one kernel with their activation.
        replay: whether a few tokens are decoded by replayed graphs.
    """

    left_out: Mapping[str, str] = field(default_factory=dict)
    most_threads: Mapping[str, int] = field(default_factory=dict)
    prefill_rows: int = 64
    chunked_from: int = 64
    expert_rows: int = 16
    attention_groups: int = 64
    mlp_rows: int = 4
    replay: bool = True

    def threads(self, kernel: str, suited: int) -> int:
        """Threads of a threadgroup of `kernel`, where its shapes would take `suited`."""
        return min(suited, self.most_threads.get(kernel, suited))


_current = Choices()


def choices() -> Choices:
    """The choices that kernels are launched by; the same object until others are taken."""
    return _current


def choose(made: Choices) -> None:
    """Launch kernels by `made` from now on; graphs that were traced before keep what they were traced with."""
    global _current  # noqa: PLW0603, one value for the process, as the device is
    _current = made


@contextmanager
def chosen(made: Choices) -> Iterator[None]:
    """As `choose`, and back again."""
    before = choices()
    choose(made)
    try:
        yield
    finally:
        choose(before)
