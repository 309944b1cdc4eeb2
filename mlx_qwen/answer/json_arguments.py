"""The arguments of a call in JSON, told while they arrive.

The call stands with its first argument that is whole: from there text streams, and every other value comes when it
ends. Only `{"name": ..., "arguments": {` is followed so; any other order or form waits for the end of the object.
"""

import re
from collections.abc import Callable

from mlx_qwen.answer.call_writer import CallWriter
from mlx_qwen.answer.tool_values import parse_json
from mlx_qwen.json_types import Json, ToolCall

_STRING = r'("(?:[^"\\]|\\.)*")'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{_STRING}\s*,\s*"(?:arguments|parameters)"\s*:\s*\{{', re.DOTALL)
_KEY = re.compile(rf"\s*{_STRING}\s*:\s*", re.DOTALL)
_SIGNS = re.compile(r'["\\\[\]{},]')
_HIGH = "[dD][89abAB]"
# As much of a string as no later piece can change: escapes are whole, and a high surrogate has what follows it.
_CERTAIN = re.compile(
    rf"(?:[^\\]+|\\[\"\\/bfnrt]|\\u(?!{_HIGH})[0-9a-fA-F]{{4}}|\\u{_HIGH}[0-9a-fA-F]{{2}}"
    rf"(?:\\u(?!{_HIGH})[0-9a-fA-F]{{4}}|(?=[^\\]|\\[^u]|\\u{_HIGH})))*"
)
_LONGEST_HEAD = 512
_LONGEST_ESCAPE = len(r"\ud83d\ude00")


class JsonArguments:
    """Follows one object; every character is looked at once. `begin` gives the writer of a call by its name."""

    def __init__(self, begin: Callable[[str], CallWriter]) -> None:
        self.writer: CallWriter | None = None
        self._begin = begin
        self._name: str | None = None
        self._over = False
        self._in_string = self._escaped = False
        self._depth = self._strings = 0
        self._streams = self._streamed = False
        # What was not told: of the head or of an argument, or an escape that is not whole.
        self._rest: list[str] = []

    def push(self, text: str) -> None:
        """Takes the next piece of the object."""
        if self._name is None and not self._over:
            text = self._behind_head(text)
        if not self._over:
            text = self._followed(text)
        if not self._streams or self._over:
            self._rest.append(text)
        elif text:
            self._show(text)

    def end(self, calls: list[ToolCall]) -> tuple[ToolCall, str]:
        """The call that was begun, `calls` being what the whole object says; and what is not in it where it is none."""
        assert self.writer is not None, "asked only for a call that was begun"
        if self._streams:
            self.writer.close()
        for key, value in calls[0].arguments.items() if calls else ():
            if key not in self.writer.given:
                self.writer.put(key, value)
        return self.writer.end(), "" if calls else "".join(self._rest)

    def _behind_head(self, text: str) -> str:
        whole = "".join([*self._rest, text])
        found = _HEAD.match(whole[:_LONGEST_HEAD])
        self._rest.clear()
        if found is None:
            self._over = len(whole) >= _LONGEST_HEAD
            self._rest.append(whole)
            return ""
        name = _parsed(found[1])
        self._over = not isinstance(name, str)
        self._name = str(name)
        return whole[found.end() :]

    def _followed(self, text: str) -> str:
        """Tells what the text holds, and returns the rest of it, which is not told yet."""
        if self._name is None:
            return text
        done, skipped = 0, 1 if self._escaped else 0
        for found in _SIGNS.finditer(text):
            sign, at = found[0], found.start()
            if self._in_string:
                if at < skipped:
                    continue
                if sign == "\\":
                    skipped = at + 2
                elif sign == '"':
                    done = self._string_ends(text, done, at)
            elif sign == '"':
                self._in_string = True
                self._strings += not self._depth
                if self._strings == 2 and not self._depth and self._begins_text(text[done:at]):
                    done = at + 1
            elif sign in "[{":
                self._depth += 1
            elif sign in "]}" and self._depth:
                self._depth -= 1
            elif sign in ",}" and not self._depth:
                done = at + 1 if self._tells(text[done:at]) else at
                self._over = self._over or sign == "}"
            if self._over:
                return text[done:]
        self._escaped = skipped > len(text)
        return text[done:]

    def _string_ends(self, text: str, done: int, at: int) -> int:
        self._in_string = False
        if not self._streams:
            return done
        self._show(text[done:at], whole=True)
        return at if self._over else at + 1

    def _begins_text(self, key: str) -> bool:
        found = _KEY.fullmatch("".join([*self._rest, key]))
        name = _parsed(found[1]) if found is not None else None
        if self.writer is None or not isinstance(name, str) or not self.writer.parameters.is_text(name):
            return False
        self._rest.clear()
        self.writer.begin(name)
        self._streams = True
        return True

    def _show(self, text: str, *, whole: bool = False) -> None:
        """More of a text; `whole`: up to its end."""
        assert self.writer is not None, "text streams in a call that was begun"
        raw = "".join([*self._rest, text])
        found = _CERTAIN.match(f'{raw}"' if whole else raw)
        certain = min(found.end(), len(raw)) if found is not None else 0
        shown, rest = _parsed(f'"{raw[:certain]}"'), raw[certain:]
        assert isinstance(shown, str), "its escapes are whole"
        self.writer.show(shown)
        self._rest[:] = [rest]
        self._over = len(rest) > _LONGEST_ESCAPE or (whole and bool(rest))
        if whole and not self._over:
            self.writer.close()
            self._streams, self._streamed = False, True

    def _tells(self, text: str) -> bool:
        """Tells an argument that is whole; False, with all following it over, where it is none."""
        text = "".join([*self._rest, text])
        self._rest[:] = []
        value = _parsed(f"{{{text}}}")
        if self._streamed and not text.strip():
            self._strings, self._streamed = 0, False
        elif not self._streamed and isinstance(value, dict) and value:
            self.writer = self.writer or self._begin(str(self._name))
            for key, one in value.items():
                self.writer.put(key, one)
            self._strings = 0
        else:
            self._over, self._rest[:] = True, [text]
        return not self._over


def _parsed(text: str) -> Json:
    """What JSON text stands for, None where it is none."""
    try:
        return parse_json(text)
    except (ValueError, RecursionError):
        return None
