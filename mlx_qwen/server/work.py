"""The seam between protocols and the engine: what a request asks, and the pieces that its answer comes in.

Protocols read an `Ask` out of a request and write `Piece`s back. Whatever implements `Backend` can stand behind them:
the engine (`backend.py`), or a script of pieces in tests.
"""

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from mlx_qwen.answer import AnswerDelta, FinishReason
from mlx_qwen.json_types import Messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request asks for.

    Attributes:
        model: the name that the client gives; None for the first model.
        prompt: chat messages, or text or token ids as they stand.
        choices: keywords of `GenerationOptions`; what is left out is the server's or the model's own.
        count: how many answers.
        stream: whether the client reads while it is written.
        notes: what was left out of the request or changed in it, for the log.
    """

    model: str | None
    prompt: str | list[int] | Messages
    choices: Mapping[str, object] = field(default_factory=dict)
    count: int = 1
    stream: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Likelihood:
    """A token's text and log-probability, with those of the likeliest tokens in its place."""

    text: str
    data: bytes
    logprob: float
    others: tuple["Likelihood", ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one or several tokens added to an answer.

    Attributes:
        delta: the words, reasoning and tool calls that they added.
        tokens: how many tokens the answer has with them.
        reasoning_tokens: how many of those are reasoning.
        cached: tokens of the prompt that were read before.
        guessed, taken: tokens that were drafted and verified for it, and how many of them were right.
        finish: why the answer ends with them; None while it goes on.
        stopped_by: the stop string that ended it.
        likelihoods: of the tokens of its words, where the request asked for them.
    """

    delta: AnswerDelta
    tokens: int = 0
    reasoning_tokens: int = 0
    cached: int = 0
    guessed: int = 0
    taken: int = 0
    finish: FinishReason | None = None
    stopped_by: str | None = None
    likelihoods: tuple[Likelihood, ...] = ()

    @classmethod
    def nothing(cls) -> "Piece":
        """What an answer begins with."""
        return cls(AnswerDelta())

    def __add__(self, later: "Piece") -> "Piece":
        """What both added, one after the other."""
        return Piece(
            self.delta + later.delta,
            later.tokens,
            later.reasoning_tokens,
            later.cached,
            later.guessed,
            later.taken,
            later.finish,
            later.stopped_by,
            self.likelihoods + later.likelihoods,
        )


class Prepared(Protocol):
    """A request that was found good: its prompt is tokenized, and nothing is computed yet."""

    @property
    def model(self) -> str:
        """The name of the model that answers."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""

    def pieces(self, index: int) -> AsyncGenerator[Piece, None]:
        """Answer `index` as it is written. Cancelling the task that reads stops the work."""

    async def aclose(self) -> None:
        """The request is over, however it ended."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as clients see it in the list."""

    name: str
    context: int | None = None
    loaded: bool = False


class Backend(Protocol):
    """Answers requests."""

    def cards(self) -> list[ModelCard]:
        """The models that can be asked, the first being the one for requests that name none."""

    def find(self, name: str | None) -> str:
        """The model that a client means by `name`; raises Refusal with 404 for an unknown one."""

    async def prepare(self, ask: Ask, progress: "Progress") -> Prepared:
        """Checks a request and tokenizes its prompt; raises Refusal or PromptError. May load the model."""


# Called with the prompt tokens read so far and all of them, from any thread.
Progress = Callable[[int, int], None]
