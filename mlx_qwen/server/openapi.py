"""Our own description of the endpoints, in OpenAPI 3.1: what is read of requests, and what comes back."""

from mlx_qwen.json_types import Json
from mlx_qwen.server.openai_fields import EFFORTS, MOST_ANSWERS, MOST_STOPS, MOST_TOP_LOGPROBS
from mlx_qwen.server.refusals import Body
from mlx_qwen.version import __version__


def document() -> Body:
    """The description."""
    paths: Body = {path: {"post": _post(path)} for path in _REQUESTS}
    paths |= {path: {"get": _get(kind)} for path, kind in _READS.items()}
    info: Body = {"title": "mlx-qwen", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": _schemas()}}


def _number(kind: str, least: float | None = None, most: float | None = None) -> Body:
    bounds = {"minimum": least, "maximum": most}
    return {"type": [kind, "null"], **{name: value for name, value in bounds.items() if value is not None}}


def _object(properties: Body, *required: str) -> Body:
    needed: list[Json] = list(required)
    return {"type": "object", "properties": properties, "required": needed}


_TEXT: Body = {"type": ["string", "null"]}
_FLAG: Body = {"type": ["boolean", "null"]}
_ANY_OBJECT: Body = {"type": ["object", "null"]}
_OBJECTS: Body = {"type": ["array", "null"], "items": {"type": "object"}}
_STOPS: Body = {
    "type": ["string", "array", "null"],
    "minLength": 1,
    "items": {"type": "string", "minLength": 1},
    "maxItems": MOST_STOPS,
}
_CONTENT: Body = {"type": ["string", "array"], "items": {"$ref": "#/components/schemas/Part"}}
_EFFORT: Body = {"enum": [*EFFORTS, None]}
_DRAWING: Body = {
    "temperature": _number("number", 0, 2),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _number("integer", 0),
    "min_p": _number("number", 0, 1),
    "presence_penalty": _number("number", -2, 2),
    "frequency_penalty": _number("number", -2, 2),
    "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0},
    "seed": _number("integer", 0, 2**63 - 1),
    "stop": _STOPS,
    "logit_bias": {"type": ["object", "null"], "additionalProperties": _number("number", -100, 100)},
}
_SHARED: Body = {"model": _TEXT, "stream": _FLAG}
_REQUESTS: dict[str, tuple[str, Body]] = {
    "/v1/chat/completions": (
        "A chat completion, as OpenAI defines it.",
        _object(
            {
                **_SHARED,
                **_DRAWING,
                "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/ChatMessage"}},
                "max_tokens": _number("integer", 1),
                "max_completion_tokens": _number("integer", 1),
                "n": _number("integer", 1, MOST_ANSWERS),
                "tools": _OBJECTS,
                "tool_choice": {"type": ["string", "object", "null"]},
                "parallel_tool_calls": _FLAG,
                "response_format": _ANY_OBJECT,
                "reasoning_effort": _EFFORT,
                "logprobs": _FLAG,
                "top_logprobs": _number("integer", 0, MOST_TOP_LOGPROBS),
                "stream_options": _ANY_OBJECT,
                "chat_template_kwargs": _ANY_OBJECT,
            },
            "messages",
        ),
    ),
    "/v1/completions": (
        "A text that is gone on with.",
        _object(
            {
                **_SHARED,
                **_DRAWING,
                "prompt": {"type": ["string", "array"], "minLength": 1},
                "max_tokens": _number("integer", 1),
                "n": _number("integer", 1, MOST_ANSWERS),
                "logprobs": _number("integer", 0, 5),
            },
            "prompt",
        ),
    ),
    "/v1/responses": (
        "A response, as OpenAI defines it.",
        _object(
            {
                **_SHARED,
                **_DRAWING,
                "input": {"type": ["string", "array"], "items": {"type": "object"}},
                "instructions": _TEXT,
                "max_output_tokens": _number("integer", 1),
                "previous_response_id": _TEXT,
                "store": _FLAG,
                "tools": _OBJECTS,
                "tool_choice": {"type": ["string", "object", "null"]},
                "reasoning": _ANY_OBJECT,
                "text": _ANY_OBJECT,
                "include": {"type": ["array", "null"], "items": {"type": "string"}},
            },
            "input",
        ),
    ),
    "/v1/messages": ("A message, as Anthropic defines it.", _object({}, "messages", "max_tokens")),
    "/v1/messages/count_tokens": ("How many tokens a message's prompt has.", _object({}, "messages")),
}
_MESSAGE_FIELDS: Body = {
    **_SHARED,
    "messages": {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Message"}},
    "max_tokens": _number("integer", 1),
    "system": {"type": ["string", "array", "null"], "items": {"$ref": "#/components/schemas/Part"}},
    "temperature": _number("number", 0, 1),
    "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
    "top_k": _number("integer", 0),
    "stop_sequences": _STOPS,
    "tools": _OBJECTS,
    "tool_choice": _ANY_OBJECT,
    "thinking": _ANY_OBJECT,
    "output_config": _ANY_OBJECT,
}
for _path in ("/v1/messages", "/v1/messages/count_tokens"):
    _REQUESTS[_path][1]["properties"] = _MESSAGE_FIELDS
_READS = {
    "/v1/models": "application/json",
    "/health": "application/json",
    "/metrics": "text/plain",
    "/openapi.json": "application/json",
}
_STATUSES = {
    "400": "The request cannot be answered; the error says why.",
    "401": "The API key is missing or wrong.",
    "403": "The page that asks may not.",
    "404": "There is no such model or response.",
    "408": "The body did not come.",
    "413": "The body is too large.",
    "421": "The server does not go by this name.",
    "429": "Too many requests wait; Retry-After says when to try again.",
    "503": "The model cannot be loaded, or the server is shutting down.",
}


def _post(path: str) -> Body:
    summary, schema = _REQUESTS[path]
    streamed: Body = {"text/event-stream": {}} if "count" not in path else {}
    good: Body = {"application/json": {"schema": {"type": "object"}}, **streamed}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "The answer.", "content": good}, **_failures()},
    }


def _get(kind: str) -> Body:
    schema: Body = {"type": "object"} if kind == "application/json" else {"type": "string"}
    good: Body = {"description": "What was asked for.", "content": {kind: {"schema": schema}}}
    return {"responses": {"200": good, **_failures("401", "403", "421")}}


def _failures(*statuses: str) -> Body:
    content: Body = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    shown = statuses or tuple(_STATUSES)
    return {status: {"description": _STATUSES[status], "content": content} for status in shown}


def _schemas() -> Body:
    part = _object({"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text")
    media = _object({"type": {"enum": ["image_url", "video_url", "image", "video"]}}, "type")
    roles: Body = {"enum": ["system", "developer", "user", "assistant", "tool"]}
    error: Body = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    return {
        "Part": {"anyOf": [part, media]},
        "ChatMessage": _object({"role": roles, "content": _CONTENT}, "role", "content"),
        "Message": _object({"role": {"enum": ["user", "assistant"]}, "content": _CONTENT}, "role", "content"),
        "Error": _object({"error": error}, "error"),
    }
