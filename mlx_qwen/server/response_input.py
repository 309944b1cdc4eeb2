"""The input of OpenAI's Responses protocol, to messages of a prompt."""

import zlib
from base64 import b64decode, b64encode

from mlx_qwen.json_types import Json
from mlx_qwen.server.content import Reading, content_of, text_of, tool_of
from mlx_qwen.server.refusals import Body, Refusal

_SEAL = "mlxqwen1."
_MOST_REASONING = 16 << 20
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Turns:
    """Messages in the making: reasoning, words and calls that follow each other are one assistant's message."""

    def __init__(self) -> None:
        self.messages: list[dict[str, object]] = []
        self._open: dict[str, object] | None = None

    def add(self, message: dict[str, object]) -> None:
        self.messages.append(message)
        self._open = None

    def assistant(self, name: str, value: object) -> None:
        if self._open is None or (name != "tool_calls" and (name in self._open or "tool_calls" in self._open)):
            self._open = {"role": "assistant"}
            self.messages.append(self._open)
        if name == "tool_calls":
            calls = self._open.setdefault(name, [])
            assert isinstance(calls, list), "as it was made"
            calls.append(value)
        else:
            self._open[name] = value


def input_messages(items: Json, at: str, reading: Reading) -> list[dict[str, object]]:
    """The messages that a text or a list of items stands for."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not isinstance(items, list):
        raise Refusal(400, f"{at} is missing; expected a text or a list of items.", param=at)
    turns = _Turns()
    for index, item in enumerate(items):
        where = f"{at}[{index}]"
        if not isinstance(item, dict):
            raise Refusal(400, f"{where} is no object.", param=where)
        _add(turns, item, where, reading)
    for message in turns.messages:
        message.setdefault("content", "")
    return turns.messages


def _add(turns: _Turns, item: Body, at: str, reading: Reading) -> None:
    kind = item.get("type", "message" if "role" in item else None)
    if kind == "message":
        role = item.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            raise Refusal(400, f"{at}.role is {role!r:.40}; expected one of {', '.join(_ROLES)}.", param=f"{at}.role")
        if item.get("content") is None:
            raise Refusal(400, f"{at}.content is missing.", param=f"{at}.content")
        if role == "assistant":
            turns.assistant("content", text_of(item["content"], f"{at}.content", reading))
        else:
            read = content_of if role == "user" else text_of
            turns.add({"role": _ROLES[role], "content": read(item["content"], f"{at}.content", reading)})
    elif kind == "reasoning":
        if text := _reasoning(item, at, reading):
            turns.assistant("reasoning_content", text)
    elif kind in ("function_call", "custom_tool_call"):
        name = item.get("name")
        if not isinstance(name, str):
            raise Refusal(400, f"{at}.name is missing.", param=f"{at}.name")
        arguments = item.get("arguments") if kind == "function_call" else {"input": item.get("input")}
        function: dict[str, object] = {"name": name, "arguments": arguments}
        turns.assistant("tool_calls", {"type": "function", "id": item.get("call_id"), "function": function})
    elif kind in ("function_call_output", "custom_tool_call_output"):
        content = content_of(item.get("output"), f"{at}.output", reading)
        turns.add({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind == "item_reference":
        raise Refusal(400, f"{at} refers to an item; send the item itself, or previous_response_id.", param=at)
    else:
        reading.note(f"input item of type {kind!r:.40} left out")


def _reasoning(item: Body, at: str, reading: Reading) -> str:
    for name in ("content", "summary"):
        if item.get(name):
            return text_of(item[name], f"{at}.{name}", reading)
    return unsealed(item.get("encrypted_content"))


def sealed(reasoning: str) -> str:
    """Reasoning for clients that keep it without reading it. It is packed, not secret."""
    return _SEAL + b64encode(zlib.compress(reasoning.encode())).decode()


def unsealed(text: Json) -> str:
    """The reasoning of `sealed`; "" for what came from another server."""
    if not isinstance(text, str) or not text.startswith(_SEAL):
        return ""
    try:
        packed = b64decode(text.removeprefix(_SEAL), validate=True)
        return zlib.decompressobj().decompress(packed, _MOST_REASONING).decode()
    except (ValueError, zlib.error):
        return ""


def response_tool(tool: Body, at: str) -> dict[str, object] | None:
    """A function tool; None for one of another type."""
    if tool.get("type") != "function":
        return None
    return tool_of(tool.get("name"), tool.get("description"), tool.get("parameters"), at)
