"""Names for the JSON that messages, tools and tool calls are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

# What callers pass: OpenAI's chat messages and function tools, as dictionaries.
Message: TypeAlias = Mapping[str, object]
Messages: TypeAlias = Sequence[Message]
Tools: TypeAlias = Sequence[Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call that the model asked for; `arguments` has the types of the tool's JSON schema."""

    name: str
    arguments: dict[str, Json]


def tool_name(tool: object) -> str | None:
    """The name that a tool's JSON description gives it, beside the description or under "function" or "custom"."""
    function = tool.get("function", tool.get("custom", tool)) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and name else None
