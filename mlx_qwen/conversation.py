"""A conversation: messages so far, and turns that the engine goes on with from what it has read."""

from collections.abc import Iterator
from typing import Unpack

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.declared import check_value, takes
from mlx_qwen.generation import check_loaded
from mlx_qwen.json_types import Message
from mlx_qwen.media.grids import Kind
from mlx_qwen.model import Model
from mlx_qwen.options import EngineSettings, GenerationOptions, OptionKeywords, options_and_settings
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from mlx_qwen.prompt.media_parts import Media
from mlx_qwen.prompt.placed import describe, prepare
from mlx_qwen.requests import stream_answer


class Conversation:
    """Messages so far; each turn reads only what the turns before did not. `system` is the system message, if any.

    Args:
        model: from `load`.
        processor: from `load`.
        options: choices for every turn as one value.
        system: the system message.
        keywords: as `stream_generate` takes and explains them; they change single ones of the options.

    Raises:
        PromptError: an option cannot be used.
    """

    @takes(GenerationOptions, EngineSettings)
    def __init__(
        self,
        model: Model,
        processor: Processor,
        options: GenerationOptions | None = None,
        *,
        system: str | None = None,
        **keywords: Unpack[OptionKeywords],
    ) -> None:
        check_loaded(model, processor)
        check_value("options", options, GenerationOptions | None)
        check_value("system", system, str | None)
        self._options, self._settings = options_and_settings(keywords, options)
        self.system = system
        self.turns: list[Message] = []
        self._attached: list[dict[str, object]] = []
        self._model = model
        self._processor = processor

    def reset(self) -> None:
        """Forgets all turns and what is attached; the system message stays."""
        self.turns.clear()
        self._attached.clear()

    def attach(self, kind: Kind, source: str) -> str:
        """Puts an image or video, by path or URL, in front of the next question; returns what the model will see.

        It is decoded here, once for all turns. Raises PromptError when it cannot be, or the model does not see.
        """
        patches = prepare(self._processor, Media(kind, source), self._options.media_limits)
        self._attached.append(Media(kind, patches).part)
        return describe(self._processor, patches)

    def ask(self, question: str) -> "Turn":
        """Begins the next turn; raises PromptError when the conversation no longer fits."""
        content = [*self._attached, {"type": "text", "text": question}] if self._attached else question
        asked: Message = {"role": "user", "content": content}
        inputs = prompt_inputs(self._processor, [*self._system_message(), *self.turns, asked], self._options)
        responses = stream_answer(self._model, self._processor, inputs, self._options, self._settings)
        return Turn(asked, inputs.ids, responses)

    def remember(self, turn: "Turn") -> None:
        """Makes a turn part of the history, also one that was interrupted after its first token."""
        if turn.tokens:
            self.turns += [turn.question, turn.answer()]
            self._attached.clear()

    def _system_message(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


class Turn:
    """One question and its answer in the making: iterate it, then `Conversation.remember` it."""

    def __init__(self, question: Message, ids: list[int], responses: Iterator[GenerationResponse]) -> None:
        self.question = question
        self.ids = ids
        self.tokens: list[int] = []
        self.last: GenerationResponse | None = None
        self._responses = responses
        self._content: list[str] = []
        self._reasoning: list[str] = []

    def __iter__(self) -> Iterator[GenerationResponse]:
        for response in self._responses:
            self.last = response
            self.tokens.append(response.token)
            self._content.append(response.delta.content)
            self._reasoning.append(response.delta.reasoning)
            yield response

    def answer(self) -> Message:
        """The answer as a message, reasoning apart; of one that was interrupted, what had come."""
        if self.last is not None and self.last.answer is not None:
            return self.last.answer.message
        message = {"role": "assistant", "content": "".join(self._content)}
        reasoning = "".join(self._reasoning)
        return {**message, "reasoning_content": reasoning} if reasoning else message
