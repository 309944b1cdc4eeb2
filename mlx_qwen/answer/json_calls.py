"""Tool calls in JSON, as Qwen3-Next writes them: `{"name": ..., "arguments": {...}}` between the outer tags."""

import re

from mlx_qwen.answer.tool_values import parse_json
from mlx_qwen.json_types import Json, ToolCall

_SIGNS = re.compile(r'["\\\[\]{}]')


class JsonText:
    """One JSON object or list that arrives in pieces; every character is looked at once."""

    def __init__(self) -> None:
        self.in_string = False
        self.strings = 0
        self._escaped = False
        self._open: list[str] = []
        self._pieces: list[str] = []

    def push(self, text: str) -> str | None:
        """Takes the next piece; what is left of it behind the end, None while there is none."""
        escaped_until = 1 if self._escaped else 0
        self._escaped = False
        for found in _SIGNS.finditer(text):
            sign, at = found[0], found.start()
            if self.in_string:
                if at < escaped_until:
                    continue
                if sign == "\\":
                    escaped_until = at + 2
                elif sign == '"':
                    self.in_string = False
                    self.strings += 1
            elif sign == '"':
                self.in_string = True
            elif sign in "[{":
                self._open.append("]" if sign == "[" else "}")
            elif sign in "]}" and self._open:
                self._open.pop()
                if not self._open:
                    self._pieces.append(text[: at + 1])
                    return text[at + 1 :]
        self._escaped = escaped_until > len(text)
        self._pieces.append(text)
        return None

    def calls(self) -> list[ToolCall]:
        """The calls that the text stands for, the brackets that it lacks at its end added; none when it is no call."""
        try:
            value: Json = parse_json("".join([*self._pieces, *reversed(self._open)]))
        except (ValueError, RecursionError):
            return []
        calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call is not None] if None not in calls else []


def _call(value: Json) -> ToolCall | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return None
    return ToolCall(str(value["name"]), arguments) if isinstance(arguments, dict) else None
