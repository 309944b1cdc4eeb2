"""Chat messages of every protocol, brought into one shape.

OpenAI's chat messages, parts and items of its Responses, Anthropic's blocks, Hugging Face's parts and what this
package's responses hold all say the same few things; two tables, of parts and of items, say which is which.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Message, Messages, ToolCall
from mlx_qwen.prompt.media_parts import Media, as_media, check_fields, media_kind
from mlx_qwen.prompt.turn import Turn

ROLES = ("system", "developer", "user", "assistant", "tool")

_ROLE_NAMES = {**{role: role for role in ROLES}, "function": "tool"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_READ_HERE = ("role", "type", "content", "refusal", "tool_calls", "function_call", *_REASONING_FIELDS)
# What Responses' items say about themselves; no template reads it.
_OF_ITEMS = ("id", "status", "phase")


_Read: TypeAlias = tuple[str, str | Media | dict[str, object] | Turn]


def standard_messages(messages: Messages) -> list[dict[str, object]]:
    """Messages of any protocol, or of several mixed, in one shape; those that have it already stay as they are.

    Taken are, as dictionaries or as the objects of openai's and anthropic's SDKs:
        roles: system, developer, user, assistant, tool, and function as tool.
        content: a text, null, nothing, or a list of texts and parts: text, input_text, output_text and refusal;
            image, image_url, input_image (by path, URL, data URL, bytes, picture, or Anthropic's `source`), video,
            video_url, input_video; thinking, reasoning, redacted_thinking; tool_use; tool_result, whose content may be
            all of this; document and search_result that hold text. A tool's content may be any JSON.
        items of the Responses API: message, reasoning, function_call, function_call_output, and the custom_tool_call
            pair. What an assistant's items say in a row becomes one message.
        an assistant's reasoning as reasoning_content, reasoning, thinking or reasoning_details, and its calls as
            tool_calls (`ToolCall`s too) or function_call, their arguments as an object or as JSON text.

    Returned are dictionaries with `role`, `content` (a text, or a list of texts and `Media` where there are some), and
    where they are not empty `reasoning_content` (text) and `tool_calls`, each {"type": "function", "function": {"name",
    "arguments": an object}} with its "id" where it has one; then whatever else a message held, such as
    `tool_call_id` and `name`. A tool_result among a user's parts becomes a message of the role tool. Signatures,
    encrypted reasoning and cache marks are left out.

    Raises PromptError, naming the message by its place, for a role, item or part of no known kind, arguments that are
    no object, and images or videos that are ambiguous, stand beside the content or in a system message.
    """
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        for turn in _read_message(message, f"Message {index}"):
            if turns and turns[-1].takes(turn):
                turns[-1].add(turn)
            else:
                turns.append(turn)
    return [turn.message() for turn in turns if not turn.is_item or turn.content or turn.calls or any(turn.reasoning)]


def _read_message(given: object, where: str) -> Iterator[Turn]:
    message = _fields(given)
    if message is None:
        raise PromptError(f"{where} is a {type(given).__name__}; expected a dictionary with role and content.")
    item = _ITEMS.get(str(message.get("type"))) if message.get("role") is None else None
    if item is not None:
        yield item(message, where)
        return
    role = _ROLE_NAMES.get(str(message.get("role")))
    if role is None:
        kind = f" and type {message['type']!r}" if "type" in message else ""
        raise PromptError(f"{where} has role {message.get('role')!r}{kind}; expected one of {', '.join(ROLES)}.")
    check_fields(message, where)
    rest = {str(key): value for key, value in message.items() if key not in _READ_HERE}
    if message.get("type") == "message":
        rest = {key: value for key, value in rest.items() if key not in _OF_ITEMS}
    first = next((text for name in _REASONING_FIELDS if (text := _reasoning(message.get(name)))), "")
    calls = [_call(call, where) for call in _listed(message.get("tool_calls"), where, "tool_calls")]
    calls += [_call(message["function_call"], where)] if message.get("function_call") else []
    content = message.get("refusal") if message.get("content") is None else message["content"]
    yield from _split(role, content, where, Turn(role, [], [first] if first else [], calls, rest))


def _split(role: str, content: object, where: str, turn: Turn) -> Iterator[Turn]:
    """The message, and before, between and behind its parts the results of tools as messages of their own."""
    results = 0
    # Reasoning beside the content and in it is the same, once for each protocol.
    beside = bool(turn.reasoning)
    for part in _parts(content, role, f"{where} ({role})"):
        kind, value = _read_part(part, where, f"{where} ({role})")
        if isinstance(value, Turn):
            results += 1
            if turn.content or turn.calls:
                yield turn
                turn = Turn(role, rest=turn.rest)
            yield value
        elif isinstance(value, dict):
            turn.calls.append(value)
        elif kind == "content":
            if isinstance(value, Media) and role in ("system", "developer"):
                raise PromptError(
                    f"{where} ({role}) holds an image or video, which models know from users and tools only. Move it "
                    "to the user's message."
                )
            turn.content += [value] if value else []
        elif isinstance(value, str) and not beside:
            turn.reasoning.append(value)
    if turn.content or turn.calls or not results:
        yield turn


def _parts(content: object, role: str, where: str) -> Sequence[object]:
    """The parts of any form of content; a tool may return JSON of any kind, which is its text."""
    if content is None:
        return ()
    if isinstance(content, str | Media):
        return (content,)
    parts = content if isinstance(content, Sequence) and not isinstance(content, bytes) else (content,)
    if role == "tool" and not all(_is_part(part) for part in parts):
        try:
            return (json.dumps(content, ensure_ascii=False),)
        except (TypeError, ValueError, RecursionError) as error:
            raise PromptError(
                f"{where} returns a {type(content).__name__}; expected text or JSON ({error})."
            ) from error
    if parts is not content and _fields(content) is None:
        raise PromptError(
            f"{where} has content of type {type(content).__name__}; expected a string or a list of parts."
        )
    return parts


def _is_part(part: object) -> bool:
    fields = _fields(part)
    return isinstance(part, str | Media) or (fields is not None and ("text" in fields or "type" in fields))


def _read_part(part: object, where: str, spoken: str) -> _Read:
    """What a part is, and of which kind: "content", "reasoning", a call or a tool's result."""
    fields = _fields(part)
    if isinstance(part, str | Media) or fields is None:
        return "content", part if isinstance(part, Media) else _text(part, spoken)
    kind = str(fields.get("type"))
    if kind in _PARTS:
        return _PARTS[kind](fields, where)
    if media_kind(fields, spoken) is not None:
        return "content", as_media(fields, where)
    return "content", _text(fields, spoken)


def _text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        kind = part.get("type", "text" if "text" in part else None)
        text = part.get(_TEXTS.get(str(kind), ""))
        if isinstance(text, str):
            return text
    raise PromptError(f'{where} holds a content part that is not {{"type": "text", "text": "..."}}: {part!r:.80}.')


def _document(part: Message, where: str) -> tuple[str, str]:
    """The text of a document or a search result."""
    source = part.get("source")
    inner = source if isinstance(source, Mapping) else {"content": part.get("content")}
    held = inner.get("data") if inner.get("type") == "text" else inner.get("content")
    if not isinstance(held, str | list | tuple):
        raise PromptError(f"{where} holds a {part['type']} that is no text; extract its text first.")
    title = part.get("title")
    text = held if isinstance(held, str) else "".join(_text(_fields(one), where) for one in held)
    return "content", f"{title}\n{text}" if title else text


def _reasoning(held: object) -> str:
    """The text of reasoning: itself, a block or item that holds it, or a list of such."""
    fields = _fields(held)
    if isinstance(held, str):
        return held
    if isinstance(held, list | tuple):
        return "\n\n".join(text for text in map(_reasoning, held) if text)
    names = ("thinking", "text", "content", "summary")
    return next((text for name in names if fields and (text := _reasoning(fields.get(name)))), "")


def _call(given: object, where: str) -> dict[str, object]:
    if isinstance(given, ToolCall):
        given = {"name": given.name, "arguments": given.arguments}
    call = _fields(given) or {}
    nested = call.get("function") or call.get("custom")
    function = _fields(nested) if nested else call
    name = function.get("name") if function else None
    if not function or not isinstance(name, str):
        raise PromptError(f'{where} has a tool call without {{"function": {{"name": ..., "arguments": ...}}}}.')
    if str(call.get("type")).startswith("custom"):
        arguments: object = {"input": function.get("input")}
    else:
        held = (function[key] for key in ("arguments", "input", "parameters") if key in function)
        arguments = _arguments(next(held, None), f"{where}, tool call {name}")
    own = call.get("call_id") or call.get("id")
    plain: dict[str, object] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": own, **plain} if own else plain


def _arguments(arguments: object, where: str) -> object:
    parsed = arguments
    if isinstance(arguments, str) and arguments.strip():
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: arguments are not valid JSON ({error}): {arguments:.80}") from error
    if not parsed and not isinstance(parsed, list):
        return {}
    if not isinstance(parsed, Mapping):
        raise PromptError(f"{where}: arguments must be a JSON object, found {type(parsed).__name__}.")
    return parsed


def _result(part: Message, where: str) -> Turn:
    """What a tool returned, as a message of its own."""
    own = part.get("tool_use_id") or part.get("call_id") or part.get("tool_call_id")
    content = part.get("output", part.get("content"))
    turn = Turn("tool", rest={"tool_call_id": own} if own else {})
    for one in _parts(content, "tool", f"{where} (tool)"):
        kind, value = _read_part(one, where, f"{where} (tool)")
        if kind == "content" and isinstance(value, str | Media):
            turn.content += [value] if value else []
    return turn


def _listed(value: object, where: str, name: str) -> Sequence[object]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise PromptError(f"{where} has {name} that are not a list.")
    return value


def _fields(value: object) -> Message | None:
    """A dictionary's fields, or those of an object of an SDK, which pydantic makes; None for anything else."""
    if isinstance(value, Mapping):
        return value
    dump = getattr(value, "model_dump", None)
    fields = dump(exclude_none=True) if callable(dump) else None
    return fields if isinstance(fields, dict) else None


_PARTS: dict[str, Callable[[Message, str], _Read]] = {
    "thinking": lambda part, where: ("reasoning", _reasoning(part)),
    "reasoning": lambda part, where: ("reasoning", _reasoning(part)),
    "redacted_thinking": lambda part, where: ("reasoning", ""),
    "tool_use": lambda part, where: ("call", _call(part, where)),
    "tool_call": lambda part, where: ("call", _call(part, where)),
    "tool_result": lambda part, where: ("result", _result(part, where)),
    "document": _document,
    "search_result": _document,
}
_ITEMS: dict[str, Callable[[Message, str], Turn]] = {
    "reasoning": lambda item, where: Turn("assistant", reasoning=[_reasoning(item)], is_item=True),
    "function_call": lambda item, where: Turn("assistant", calls=[_call(item, where)], is_item=True),
    "custom_tool_call": lambda item, where: Turn("assistant", calls=[_call(item, where)], is_item=True),
    "function_call_output": _result,
    "custom_tool_call_output": _result,
}
