"""Messages and tools of chat/completions, to those of a prompt."""

from mlx_qwen.json_types import Json
from mlx_qwen.server.content import Reading, content_of, text_of, tool_of
from mlx_qwen.server.refusals import Body, Refusal

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_REASONING = ("reasoning_content", "reasoning", "thinking")


def chat_messages(messages: list[Body], reading: Reading) -> list[dict[str, object]]:
    """The messages, with the fields that a prompt knows."""
    if not messages:
        raise Refusal(400, "messages is empty; expected at least one.", param="messages")
    return [_message(one, f"messages[{index}]", reading) for index, one in enumerate(messages)]


def _message(message: Body, at: str, reading: Reading) -> dict[str, object]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise Refusal(400, f"{at}.role is {role!r:.40}; expected one of {', '.join(_ROLES)}.", param=f"{at}.role")
    calls = message.get("tool_calls")
    if message.get("content") is None and not (role == "assistant" and (calls or _reasoning(message))):
        raise Refusal(400, f"{at}.content is missing; expected a text or a list of parts.", param=f"{at}.content")
    read = text_of if role in ("system", "developer") else content_of
    plain: dict[str, object] = {"role": _ROLES[role], "content": read(message.get("content"), f"{at}.content", reading)}
    if role == "tool" and message.get("tool_call_id") is not None:
        plain["tool_call_id"] = message["tool_call_id"]
    if role == "assistant":
        if reasoning := _reasoning(message):
            plain["reasoning_content"] = reasoning
        if calls:
            plain["tool_calls"] = _calls(calls, f"{at}.tool_calls")
    return plain


def _reasoning(message: Body) -> str | None:
    return next((text for name in _REASONING if isinstance(text := message.get(name), str) and text), None)


def _calls(calls: Json, at: str) -> list[dict[str, object]]:
    read: list[dict[str, object]] = []
    for index, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refusal(400, f"{at}[{index}] is no call of a function with a name.", param=f"{at}[{index}]")
        arguments = function.get("arguments")
        read.append(
            {"type": "function", "id": call.get("id"), "function": {"name": function["name"], "arguments": arguments}}
        )
    return read


def chat_tool(tool: Body, at: str) -> dict[str, object] | None:
    """A function tool; None for one of another type."""
    if tool.get("type", "function") != "function":
        return None
    function = tool.get("function", tool)
    if not isinstance(function, dict):
        raise Refusal(400, f"{at}.function is no description of a function.", param=f"{at}.function")
    return tool_of(function.get("name"), function.get("description"), function.get("parameters"), f"{at}.function")
