"""A conversation: messages so far, and turns that the engine goes on with from what it has read."""

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Unpack

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.declared import check_value, takes
from mlx_qwen.generation import check_loaded
from mlx_qwen.json_types import Message, Messages
from mlx_qwen.keywords import OptionKeywords, options_and_settings
from mlx_qwen.media.grids import Kind
from mlx_qwen.media.patches import Patches
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from mlx_qwen.prompt.media_parts import Media, media_kind, message_media
from mlx_qwen.prompt.placed import describe, prepare
from mlx_qwen.requests import stream_answer
from mlx_qwen.settings import EngineSettings

_ADDRESS = re.compile("(https?|file|data):", re.IGNORECASE)


class Conversation:
    """Messages so far; each turn reads only what the turns before did not.

    Args:
        model: from `load`.
        processor: from `load`.
        options: choices for every turn as one value.
        system: the system message.
        keywords: as `stream_generate` takes and explains them; they change single ones of the options.

    Attributes:
        system: the system message, if any.
        turns: the messages behind it, images and videos in them as patches.
        options: choices for the turns to come; `choose` changes them.
        settings: likewise, of the engine.

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
        self.options, self.settings = options_and_settings(keywords, options)
        self.system = system
        self.turns: list[Message] = []
        self._attached: list[dict[str, object]] = []
        self._sources: list[tuple[Patches, str]] = []
        self._model = model
        self._processor = processor

    def choose(self, keywords: Mapping[str, object]) -> None:
        """Changes options by name for the turns to come; raises PromptError, and changes none, for a wrong one."""
        self.options, self.settings = options_and_settings(keywords, self.options, self.settings)

    def reset(self) -> None:
        """Forgets all turns and what is attached; the system message stays."""
        for kept in (self.turns, self._attached, self._sources):
            kept.clear()

    def attach(self, kind: Kind, source: str) -> str:
        """Puts an image or video, by path or URL, in front of the next question; returns what the model will see.

        It is decoded here, once for all turns. Raises PromptError when it cannot be, or the model does not see.
        """
        part = self._decoded(Media(kind, source, self.options.media_limits))
        self._attached.append(part)
        return describe(self._processor, self._sources[-1][0])

    def ask(self, question: str) -> "Turn":
        """Begins the next turn; raises PromptError when the conversation no longer fits."""
        content = [*self._attached, {"type": "text", "text": question}] if self._attached else question
        return self._begin([{"role": "user", "content": content}])

    def give_results(self, results: Sequence[str]) -> "Turn":
        """Goes on with what the tools returned that the last answer calls, in their order; raises as `ask` does."""
        return self._begin([{"role": "tool", "content": result} for result in results])

    def remember(self, turn: "Turn") -> None:
        """Makes a turn part of the history, also one that was interrupted after its first token."""
        if turn.tokens:
            self.turns += [*turn.asked, turn.answer()]
            self._attached.clear()

    def undo(self) -> str | None:
        """Takes back the last question and all that followed; returns its text, or None where there is none.

        Images and videos that it asked about are attached again.
        """
        last = max((i for i, message in enumerate(self.turns) if message["role"] == "user"), default=None)
        if last is None:
            return None
        content = self.turns[last]["content"]
        del self.turns[last:]
        if isinstance(content, str):
            return content
        assert isinstance(content, list), "content is a text or parts"
        self._attached = [part for part in content if "text" not in part] + self._attached
        return "".join(str(part["text"]) for part in content if "text" in part)

    def messages(self) -> list[Message]:
        """The system message and all turns as plain JSON: images and videos by absolute path or URL."""
        return [
            {**one, "content": self._by_source(one.get("content"))} for one in [*self._system_message(), *self.turns]
        ]

    def restore(self, messages: Messages) -> None:
        """Goes on from messages as `messages` gives them, in the place of what there was.

        Raises PromptError, and changes nothing, when they or their images cannot be used.
        """
        before = list(self._sources)
        try:
            media = iter([self._decoded(one) for one in message_media(messages)])
            turns = [_with_parts(message, media) for message in messages]
            system = turns.pop(0)["content"] if turns and turns[0].get("role") == "system" else None
            check_value("the system message", system, str | None)
            if turns:
                prompt_inputs(self._processor, [*turns], self.options)
        except BaseException:
            self._sources = before
            raise
        self.system = None if system is None else str(system)
        self.turns, self._attached = turns, []

    def _begin(self, asked: list[Message]) -> "Turn":
        inputs = prompt_inputs(self._processor, [*self._system_message(), *self.turns, *asked], self.options)
        responses = stream_answer(self._model, self._processor, inputs, self.options, self.settings)
        return Turn(asked, inputs.ids, responses)

    def _decoded(self, media: Media) -> dict[str, object]:
        """The content part with an image's or video's patches, whose path or URL is noted."""
        patches = prepare(self._processor, media, self.options.media_limits)
        source = str(media.source)
        self._sources.append((patches, source if _ADDRESS.match(source) else str(Path(source).expanduser().absolute())))
        return Media(media.kind, patches).part

    def _by_source(self, content: object) -> object:
        if not isinstance(content, list):
            return content
        return [{name: self._source(value) for name, value in part.items()} for part in content]

    def _source(self, value: object) -> object:
        return next((source for patches, source in self._sources if patches is value), value)

    def _system_message(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def _with_parts(message: Message, media: Iterator[dict[str, object]]) -> Message:
    """The message with the next of `media` in the place of each image and video."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts = [next(media) if media_kind(part, "A message") else part for part in content]
    return {**message, "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in parts]}


class Turn:
    """Questions and their answer in the making: iterate it, then `Conversation.remember` it."""

    def __init__(self, asked: list[Message], ids: list[int], responses: Iterator[GenerationResponse]) -> None:
        self.asked = asked
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

    def close(self) -> None:
        """Stops the answer, if it goes on."""
        if isinstance(self._responses, Generator):
            self._responses.close()

    def answer(self) -> Message:
        """The answer as a message, reasoning apart; of one that was interrupted, what had come."""
        if self.last is not None and self.last.answer is not None:
            return self.last.answer.message
        message = {"role": "assistant", "content": "".join(self._content)}
        reasoning = "".join(self._reasoning)
        return {**message, "reasoning_content": reasoning} if reasoning else message
