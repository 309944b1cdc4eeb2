"""Checks chat messages and brings them into the one form that chat templates expect."""

import json
import re
import warnings
from collections.abc import Mapping, Sequence

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json, Message, Messages, ToolCall, Tools, tool_name
from mlx_qwen.prompt.media_parts import check_fields, media_kind, placeholder_part

ROLES = ("system", "user", "assistant", "tool")

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_TOOL_RESPONSE = re.compile(r"\s*<tool_response>.*</tool_response>\s*", re.DOTALL)


def prepare_messages(messages: Messages) -> list[dict[str, Json]]:
    """Copies messages into plain JSON, repairs what has one obvious meaning and refuses the rest.

    Text parts are joined, `ToolCall`s and tool arguments in JSON strings brought into form, and system messages after
    the first merged into it (with a warning). Where a message holds images or videos its content stays a list of
    parts, {"type": "image"} or {"type": "video"} for each of them. Raises PromptError naming the message when a role
    is unknown, content is neither text, images nor videos, a system message holds images, images stand beside the
    content, or no message is a user's question.
    """
    if not messages:
        raise PromptError('The list of messages is empty; pass at least one, like {"role": "user", "content": "..."}.')
    plain = [_message(message, f"Message {index}") for index, message in enumerate(messages)]
    plain = _merge_system_messages(plain)
    if not any(_is_query(message) for message in plain):
        roles = ", ".join(str(message["role"]) for message in plain)
        raise PromptError(f'No message asks anything: add one with role "user" (found: {roles}).')
    return plain


def prepare_tools(tools: Tools | None) -> list[Json] | None:
    """Copies tools into plain JSON; raises PromptError when one is not a JSON description of a function."""
    if not tools:
        return None
    prepared: list[Json] = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise PromptError(
                f"Tool {index} is a {type(tool).__name__}; describe it as JSON: "
                '{"type": "function", "function": {"name": ..., "parameters": {...}}}.'
            )
        if tool_name(tool) is None:
            raise PromptError(
                f'Tool {index} has no name; expected {{"type": "function", "function": {{"name": ...}}}}.'
            )
        prepared.append(_plain(tool, f"Tool {index}"))
    return prepared


def part_text(part: object, where: str) -> str:
    """The text of one content part; raises PromptError when it is none."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise PromptError(f'{where} holds a content part that is not {{"type": "text", "text": "..."}}: {part!r:.80}.')


def _message(message: Message, where: str) -> dict[str, Json]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} is a {type(message).__name__}; expected a dictionary with role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise PromptError(f"{where} has role {role!r}; expected one of {', '.join(ROLES)}.")
    check_fields(message, where)
    plain = {str(key): _plain(value, where) for key, value in message.items() if key not in ("content", "tool_calls")}
    plain["content"] = _content(message.get("content"), f"{where} ({role})", has_calls=bool(message.get("tool_calls")))
    if role == "system" and not isinstance(plain["content"], str):
        raise PromptError(
            f"{where} (system) holds an image or video; chat templates allow text only there. Move it to the user."
        )
    if message.get("tool_calls"):
        plain["tool_calls"] = _tool_calls(message["tool_calls"], where)
    reasoning = next((plain[field] for field in _REASONING_FIELDS if plain.get(field) is not None), None)
    if reasoning is not None:
        plain["reasoning_content"] = reasoning
    return plain


def _content(content: object, where: str, *, has_calls: bool) -> Json:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence) and not isinstance(content, bytes):
        kinds = [media_kind(part, where) for part in content]
        parts: list[Json] = [
            {"type": "text", "text": part_text(part, where)} if kind is None else placeholder_part(kind)
            for part, kind in zip(content, kinds, strict=True)
        ]
        return parts if any(kinds) else "".join(part_text(part, where) for part in content)
    if content is None and has_calls:
        return ""
    raise PromptError(f"{where} has content of type {type(content).__name__}; expected a string or a list of parts.")


def _tool_calls(calls: object, where: str) -> Json:
    plain = _plain(calls, where)
    if not isinstance(plain, list):
        raise PromptError(f"{where} has tool_calls that are not a list.")
    for call in plain:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise PromptError(f'{where} has a tool call without {{"function": {{"name": ..., "arguments": ...}}}}.')
        function["arguments"] = _arguments(function.get("arguments"), f"{where}, tool call {function['name']}")
    return plain


def _arguments(arguments: Json, where: str) -> Json:
    parsed = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise PromptError(f"{where}: arguments are not valid JSON ({error}): {arguments:.80}") from error
    if not parsed and not isinstance(parsed, list):
        return {}
    if not isinstance(parsed, dict):
        raise PromptError(f"{where}: arguments must be a JSON object, found {type(parsed).__name__}.")
    return parsed


def _merge_system_messages(messages: list[dict[str, Json]]) -> list[dict[str, Json]]:
    late = [index for index, message in enumerate(messages) if index and message["role"] == "system"]
    if not late:
        return messages
    warnings.warn(
        f"System message at position {late[0]} moved to the start: Qwen's chat template allows one, at the start only.",
        stacklevel=2,
    )
    system = [message for message in messages if message["role"] == "system"]
    merged = {**system[0], "content": "\n\n".join(str(message["content"]) for message in system)}
    return [merged, *(message for message in messages if message["role"] != "system")]


def _is_query(message: dict[str, Json]) -> bool:
    return message["role"] == "user" and not _TOOL_RESPONSE.fullmatch(str(message["content"]))


def _plain(value: object, where: str) -> Json:
    """A deep copy made of JSON types only, so that a template never gets hold of an object with methods."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, ToolCall):
        return {"type": "function", "function": {"name": value.name, "arguments": _plain(value.arguments, where)}}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_plain(item, where) for item in value]
    raise PromptError(
        f"{where} holds a value of type {type(value).__name__}; use text, numbers, lists and dictionaries only."
    )
