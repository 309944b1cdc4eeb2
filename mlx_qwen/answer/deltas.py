"""What an answer consists of: piece by piece as it comes, and whole at its end."""

import json
from dataclasses import dataclass
from typing import Literal

from mlx_qwen.json_types import Json, ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]
# Why a think block was closed for the model.
ClosedBy = Literal["budget", "loop"]


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a piece of text added to one tool call.

    Attributes:
        index: which of the answer's calls, from 0.
        name: the function's name, with the call's first delta only.
        arguments: the next piece of the arguments as JSON text; all pieces of a call joined are one JSON object.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a piece of text added to the answer, each part without the tags around it.

    Attributes:
        text: the raw text that is certain with it, tags included.
        content: what it added to the words for the user.
        reasoning: what it added to the think block.
        tool_calls: what it added to tool calls, in order, at most one entry a call. A call that the answer's end cuts
            short is begun here and missing in the whole answer, whose content then holds its text.
    """

    text: str = ""
    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __add__(self, other: "AnswerDelta") -> "AnswerDelta":
        """What both added, one after the other."""
        return AnswerDelta(
            self.text + other.text,
            self.content + other.content,
            self.reasoning + other.reasoning,
            merged([*self.tool_calls, *other.tool_calls]),
        )


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """A whole answer: the deltas summed.

    Attributes:
        content: the words for the user, without reasoning and tool calls.
        reasoning: the text of the think block, None when there was none.
        tool_calls: the calls that are complete.
        finish_reason: "stop" (end token or stop string), "tool_calls" (the same, with calls) or "length".
    """

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason

    @property
    def message(self) -> dict[str, Json]:
        """The answer as a chat message, to be put behind the messages that it answers."""
        message: dict[str, Json] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


def json_text(value: Json) -> str:
    """A value as JSON, letters as they are."""
    return json.dumps(value, ensure_ascii=False)


def merged(deltas: list[ToolCallDelta]) -> tuple[ToolCallDelta, ...]:
    """The same deltas with one entry a call."""
    names: dict[int, str | None] = {}
    pieces: dict[int, list[str]] = {}
    for delta in deltas:
        names[delta.index] = names.get(delta.index) or delta.name
        pieces.setdefault(delta.index, []).append(delta.arguments)
    return tuple(ToolCallDelta(index, names[index], "".join(pieces[index])) for index in pieces)
