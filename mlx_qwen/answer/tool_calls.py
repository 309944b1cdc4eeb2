"""Reads tool calls out of model text while it is still arriving.

Qwen3.5 writes `<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>`;
Qwen3-Next writes `{"name": ..., "arguments": {...}}` between the same outer tags.
"""

import json
import re
from collections.abc import Mapping

from mlx_qwen.answer.tags import partial_tag_length
from mlx_qwen.answer.tool_values import typed_value
from mlx_qwen.json_types import Json, ToolCall, Tools

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"

# A value may itself contain closing tags (code, XML): one counts only where the format goes on after it.
_FUNCTION = re.compile(
    r"<function=([^>\n]+)>\s*(?:(<parameter=.*?</parameter>)\s*)?</function>\s*(?=<function=|\Z)", re.DOTALL
)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)
_LAST_FUNCTION_CLOSED = re.compile(r"(?:</parameter>|<function=[^>\n]+>)\s*</function>\s*\Z")


class ToolCallParser:
    """Separates tool calls from the text around them, wherever the pieces it is given are cut.

    `tools` are the function descriptions that the model was given: their JSON schemas type the values. Values of
    parameters without a schema stay strings. A block that is no tool call is given back as text.
    """

    def __init__(self, tools: Tools | None = None) -> None:
        self.calls: list[ToolCall] = []
        self._schemas = _parameter_schemas(tools or ())
        self._buffer = ""
        self._inside = False
        self._searched = 0

    def push(self, text: str) -> str:
        """Takes the next piece and returns the text that is certainly outside of any call."""
        self._buffer += text
        outside = ""
        while True:
            if not self._inside:
                before, tag, _ = self._buffer.partition(_OPEN)
                if not tag:
                    certain = len(before) - partial_tag_length(before, (_OPEN,))
                    self._buffer = before[certain:]
                    return outside + before[:certain]
                outside += before
                self._buffer = self._buffer[len(before) :]
                self._inside, self._searched = True, len(_OPEN)
            end = self._end_of_call()
            if end is None:
                return outside
            outside += self._close(end)

    def finish(self) -> str:
        """The rest of the text. A call that lacks nothing but its last tag counts; any other is given back as text."""
        rest, self._buffer = self._buffer, ""
        if not self._inside:
            return rest
        self._inside = False
        calls = self._parse(rest[len(_OPEN) :])
        self.calls += calls
        return "" if calls else rest

    def _end_of_call(self) -> int | None:
        while (end := self._buffer.find(_CLOSE, self._searched)) >= 0:
            body = self._buffer[len(_OPEN) : end]
            if "<function=" not in body or _LAST_FUNCTION_CLOSED.search(body):
                return end
            self._searched = end + len(_CLOSE)
        self._searched = max(self._searched, len(self._buffer) - len(_CLOSE) + 1)
        return None

    def _close(self, end: int) -> str:
        block, self._buffer = self._buffer[: end + len(_CLOSE)], self._buffer[end + len(_CLOSE) :]
        self._inside = False
        calls = self._parse(block[len(_OPEN) : end])
        self.calls += calls
        return "" if calls else block

    def _parse(self, body: str) -> list[ToolCall]:
        if "<function=" not in body:
            return _json_call(body)
        return [self._call(name.strip(), parameters) for name, parameters in _FUNCTION.findall(body)]

    def _call(self, name: str, body: str) -> ToolCall:
        schemas = self._schemas.get(name, {})
        values = ((key.strip(), value) for key, value in _PARAMETER.findall(body))
        return ToolCall(name, {key: typed_value(value, schemas.get(key)) for key, value in values})


def _json_call(body: str) -> list[ToolCall]:
    try:
        call: Json = json.loads(body)
    except json.JSONDecodeError:
        return []
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return []
    arguments = call.get("arguments", {})
    return [ToolCall(str(call["name"]), arguments)] if isinstance(arguments, dict) else []


def _parameter_schemas(tools: Tools) -> dict[str, dict[str, object]]:
    """Function name -> parameter name -> JSON schema."""
    schemas: dict[str, dict[str, object]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            schemas[str(function.get("name"))] = dict(properties) if isinstance(properties, Mapping) else {}
    return schemas
