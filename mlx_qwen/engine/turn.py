"""What a step is told from outside: what callers, readers and clocks decide, so that several can take the same one."""

from collections.abc import Sequence as Listed
from typing import NamedTuple, Protocol

from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.sequence import Sequence

# What goes to the readers: tokens, and the errors that end answers.
Outgoing = list[tuple[Sequence, Emission | BaseException | None]]


class Passed(NamedTuple):
    """How long a pass took: of so many rows, with so many drafts from this or that drafter.

    `rows` is 0 where something else was computed.
    """

    rows: int = 0
    drafter: str = ""
    depth: int = 0
    seconds: float = 0.0


class Turn(NamedTuple):
    """One step of an engine. Whoever takes the same turns from the same beginning writes the same answers.

    Attributes:
        coming: answers that are asked for.
        cancelled: numbers of answers that nobody waits for any more.
        behind: numbers of those whose readers are too far behind to write more.
        passed: what was computed since the turn before, and how long it took.
        most_rows: how many answers may be written at the same time.
    """

    coming: tuple[Sequence, ...] = ()
    cancelled: frozenset[int] = frozenset()
    behind: frozenset[int] = frozenset()
    passed: tuple[Passed, ...] = ()
    most_rows: int = 16

    @property
    def tells(self) -> bool:
        """Whether it says anything that has to be done."""
        return bool(self.coming or self.cancelled)


class Ranks(Protocol):
    """Other processes that hold the rest of the model and take every turn of this one's engine."""

    def check(self, sequence: Sequence) -> None:
        """Raises PromptError for an answer that cannot be told of."""

    def announce(self, sequence: Sequence) -> None:
        """Tell all of an answer that is asked for; it arrives at the engine once all are ready for it."""

    def send(self, turn: Turn) -> None:
        """Tell all of a turn, before it is taken here."""

    def computing(self, tokens: int, *, is_prompt: bool, foreseen: bool = True) -> None:
        """Note that so many tokens of a prompt or of answers are computed from now on, foreseen ones as others were."""

    def computed(self) -> None:
        """Note that they are computed here."""

    def took(self, outgoing: Listed[tuple[Sequence, Emission | BaseException | None]]) -> None:
        """Note what a turn gave here. Where an answer failed for a reason of this machine, this ends all."""
