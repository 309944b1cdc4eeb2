"""One tool call in the making: what is known of it goes out as deltas."""

from mlx_qwen.answer.deltas import ToolCallDelta, json_text
from mlx_qwen.answer.tools import Parameters
from mlx_qwen.json_types import Json, ToolCall


class CallWriter:
    """Writes the arguments of a call as JSON while its parameters arrive: text at once, other values when whole."""

    def __init__(self, index: int, name: str, parameters: Parameters, out: list[ToolCallDelta]) -> None:
        self.parameters = parameters
        self.given: dict[str, Json] = {}
        self._index = index
        self._name = name
        self._out = out
        self._key = ""
        self._is_text = True
        self._pieces: list[str] = []
        self._breaks: int | None = None
        out.append(ToolCallDelta(index, name))

    def is_parameter(self, name: str) -> bool:
        """Whether a tag with this name can begin the next parameter, rather than be part of the current one's text.

        Only a text can hold such a tag; there it counts when the schema has the name and it was not given yet.
        """
        return not self._is_text or (name in self.parameters and name != self._key and name not in self.given)

    def begin(self, key: str) -> None:
        """The next parameter begins."""
        self._key, self._is_text = key, self.parameters.is_text(key)
        self._pieces.clear()
        self._breaks = None
        self._write(f"{', ' if self.given else '{'}{json_text(key)}: " + ('"' if self._is_text else ""))

    def add(self, text: str) -> None:
        """More of the value. Its first line break belongs to the tag, and its last ones wait for what follows."""
        if not text:
            return
        if self._breaks is None:
            self._breaks = 0
            text = text.removeprefix("\n")
        shown = text.rstrip("\n")
        breaks, self._breaks = self._breaks, len(text) - len(shown)
        if shown:
            self.show("\n" * breaks + shown)
        else:
            self._breaks += breaks

    def close(self, *, loose: bool = False) -> None:
        """The value is whole. Where its closing tag is missing (`loose`), no line break at its end belongs to it."""
        kept = 0 if loose else (self._breaks or 0) - 1
        if kept > 0:
            self.show("\n" * kept)
        text = "".join(self._pieces)
        self.given[self._key] = text if self._is_text else self.parameters.value(self._key, text)
        self._write('"' if self._is_text else json_text(self.given[self._key]))
        self._is_text = True

    def end(self) -> ToolCall:
        """The call is whole."""
        self._write("}" if self.given else "{}")
        return ToolCall(self._name, self.given)

    def put(self, key: str, value: Json) -> None:
        """An argument that came as JSON, whole."""
        value = self.parameters.checked({key: value})[key]
        self._write(f"{', ' if self.given else '{'}{json_text(key)}: {json_text(value)}")
        self.given[key] = value

    def show(self, text: str) -> None:
        """More of the value, letter for letter."""
        self._pieces.append(text)
        if self._is_text:
            self._write(json_text(text)[1:-1])

    def _write(self, text: str) -> None:
        self._out.append(ToolCallDelta(self._index, None, text))
