"""What a reader gets of an answer: a token at a time, with what is made of it."""

from typing import NamedTuple, Protocol

from mlx_qwen.answer import ClosedBy, FinishReason
from mlx_qwen.engine.choice import Choice


class Follower(Protocol):
    """Turns tokens into what the reader gets, and says when the answer has ended, by an end token or a stop string."""

    def push(self, token: int) -> object:
        """What the token adds."""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer has ended; None while it goes on."""


class Endless:
    """Follows an answer that no token ends."""

    finish_reason: FinishReason | None = None

    def push(self, token: int) -> None:
        """Nothing is made of it."""


class Emission(NamedTuple):
    """A token on its way to the reader.

    Attributes:
        token: its id.
        choice: the distribution that it was taken from.
        from_draft: whether a draft proposed it.
        added: what the follower made of it.
        finish_reason: why the answer ends with it; None while it goes on.
        number: how many tokens the answer has with it.
        reasoning_tokens: how many of those are reasoning.
        thinking_closed_by: why the think block was closed for the model; None where it was not.
    """

    token: int
    choice: Choice
    from_draft: bool
    added: object
    finish_reason: FinishReason | None
    number: int
    reasoning_tokens: int = 0
    thinking_closed_by: ClosedBy | None = None
