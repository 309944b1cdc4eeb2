"""Brings chat messages and tools into the plain JSON that chat templates are given."""

import re
from collections.abc import Mapping, Sequence

from mlx_qwen.answer import AnswerStream
from mlx_qwen.answer.reasoning import THINK_END, THINK_START
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json, Messages, ToolCall, Tools, tool_name
from mlx_qwen.prompt.media_parts import Media, placeholder_part
from mlx_qwen.prompt.shapes import standard_messages

# Where reasoning ends in a raw answer: a `</think>` in the middle of a line is a mention.
_END = re.compile(rf"(?:\A|\n){THINK_END}(?:\n|\Z)")
_CALL = re.compile(r"<tool_call>\s*(?:<function=|\{)")


def prepare_messages(messages: Messages, tools: Tools | None = None) -> list[dict[str, Json]]:
    """Copies messages, of whatever protocol, into plain JSON.

    They are what `standard_messages` takes and gives. An assistant's content that is a raw answer, as `generate`
    returns it, is taken apart into reasoning, words and calls, whose values the schemas of `tools` type. Where a
    message holds images or videos its content is a list of parts, {"type": "text", "text": ...}, {"type": "image"} or
    {"type": "video"}; else it is a text. Raises PromptError for no messages, for values that are no JSON, and as
    `standard_messages` does.
    """
    if not messages:
        raise PromptError('The list of messages is empty; pass at least one, like {"role": "user", "content": "..."}.')
    plain = [_message(message, f"Message {index}") for index, message in enumerate(standard_messages(messages))]
    return [_taken_apart(message, tools) for message in plain]


def prepare_tools(tools: Tools | None) -> list[Json] | None:
    """Copies tools, of whatever protocol, into plain JSON in OpenAI's form.

    Raises PromptError when one is not a JSON description of a function.
    """
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
        prepared.append(plain_json(_as_function(tool), f"Tool {index}"))
    return prepared


def function_tools(tools: Tools) -> list[dict[str, object]]:
    """Those of a client's tools that a local model can call, in OpenAI's form.

    They are functions as OpenAI's chat and Responses, Anthropic and Hugging Face describe them, and custom tools, which
    take one text, `input`. Left out are those that a provider's own servers would run, such as web_search.
    """
    kinds = (None, "function", "custom")
    return [dict(_as_function(tool)) for tool in tools if tool.get("type") in kinds and tool_name(tool) is not None]


def _as_function(tool: Mapping[str, object]) -> Mapping[str, object]:
    """A tool as {"type": "function", "function": {"name", "description", "parameters"}}."""
    if isinstance(tool.get("function"), Mapping):
        return tool
    nested = tool.get("custom")
    described = nested if isinstance(nested, Mapping) else tool
    function = {key: value for key, value in described.items() if key not in ("type", "input_schema", "cache_control")}
    if tool.get("type") == "custom" and "input_schema" not in tool:
        function = {key: value for key, value in function.items() if key != "format"}
        text = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        return {"type": "function", "function": {**function, "parameters": text}}
    if "input_schema" in tool:
        function["parameters"] = tool["input_schema"]
    return {"type": "function", "function": function}


def _taken_apart(message: dict[str, Json], tools: Tools | None) -> dict[str, Json]:
    content = message["content"]
    if message["role"] != "assistant" or not isinstance(content, str) or "tool_calls" in message:
        return message
    begun = content.lstrip().startswith(THINK_START)
    end = None if "reasoning_content" in message else _END.search(content)
    if not end and not _CALL.search(content):
        return message
    if begun and not end:
        return message
    stream = AnswerStream(inside_thinking=end is not None and not begun, tools=tools)
    stream.push(content)
    stream.finish()
    return {**message, **stream.answer("stop").message}


def _message(message: dict[str, object], where: str) -> dict[str, Json]:
    content = message["content"]
    plain = {key: plain_json(value, where) for key, value in message.items() if key != "content"}
    parts = content if isinstance(content, list) else None
    plain["content"] = plain_json(content, where) if parts is None else [_plain_part(part) for part in parts]
    return plain


def _plain_part(part: object) -> Json:
    return placeholder_part(part.kind) if isinstance(part, Media) else {"type": "text", "text": str(part)}


def plain_json(value: object, where: str) -> Json:
    """A deep copy made of JSON types only, so that a template never gets hold of an object with methods."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, ToolCall):
        return {"type": "function", "function": {"name": value.name, "arguments": plain_json(value.arguments, where)}}
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, where) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain_json(item, where) for item in value]
    raise PromptError(
        f"{where} holds a value of type {type(value).__name__}; use text, numbers, lists and dictionaries only."
    )
