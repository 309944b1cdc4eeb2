"""Bytes in and out: a request's body as JSON within limits, answers as JSON or server-sent events."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeAlias

from mlx_qwen.json_types import Json
from mlx_qwen.server.refusals import Body, Refusal

# ASGI's three parts of a request.
Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

DEEPEST = 100
# Seconds that a client may take to send its body, and to take what is written to it.
PATIENCE = 60.0
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class Gone(Exception):  # noqa: N818, what it is
    """The client has left."""


def header(scope: Scope, name: bytes) -> str | None:
    """A header's value, the first where there are several."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The body; Refusal with 413 before one byte is read that is above `most`, 408 for one that does not come."""
    stated = header(scope, b"content-length")
    if stated is not None and (not stated.isascii() or not stated.isdigit() or int(stated) > most):
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise _too_large(most)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError as error:
        raise Refusal(408, f"The body did not come within {PATIENCE:.0f} seconds.") from error


def parse_object(data: bytes) -> tuple[Body, list[str]]:
    """The JSON object that a body holds, and what had to be mended in it; raises Refusal for anything else."""
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"The body is not UTF-8 ({error.reason} at byte {error.start}).") from error
    except RecursionError as error:
        raise Refusal(400, f"The body is nested more than {DEEPEST} levels deep.") from error
    except ValueError as error:
        raise Refusal(400, f"The body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refusal(400, "The body is not a JSON object.")
    _check_depth(value)
    if "\\ud" not in text.lower() or not _HALF_PAIR.search(json.dumps(value, ensure_ascii=False)):
        return value, []
    return _mended(value), ["half a surrogate pair became U+FFFD"]


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _check_depth(value: Json) -> None:
    level: list[Json] = [value]
    for _ in range(DEEPEST):
        level = [part for one in level for part in _parts(one)]
        if not level:
            return
    raise Refusal(400, f"The body is nested more than {DEEPEST} levels deep.")


def _parts(value: Json) -> Iterable[Json]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _mended(value: Json) -> Any:
    if isinstance(value, str):
        return _HALF_PAIR.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, dict):
        return {_mended(key): _mended(one) for key, one in value.items()}
    return [_mended(one) for one in value] if isinstance(value, list) else value


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"The body is larger than {most >> 20} MB, which is this server's limit (--max-body).")


async def send_json(send: Send, status: int, body: Json, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer as JSON."""
    await send_bytes(send, status, json_bytes(body), {"content-type": "application/json", **(headers or {})})


async def send_bytes(send: Send, status: int, data: bytes, headers: Mapping[str, str]) -> None:
    """A whole answer."""
    await send_start(send, status, {**headers, "content-length": str(len(data))})
    await _sent(send({"type": "http.response.body", "body": data}))


async def send_start(send: Send, status: int, headers: Mapping[str, str]) -> None:
    """Status and headers."""
    pairs = [(key.encode("latin-1"), value.encode("latin-1")) for key, value in headers.items()]
    await _sent(send({"type": "http.response.start", "status": status, "headers": pairs}))


async def send_part(send: Send, data: bytes, *, more: bool = True) -> None:
    """A part of a streamed answer. A client that takes nothing for too long counts as gone."""
    await _sent(send({"type": "http.response.body", "body": data, "more_body": more}))


async def _sent(sending: Awaitable[None]) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            await sending
    except (TimeoutError, OSError) as error:
        raise Gone from error


def json_bytes(body: Json) -> bytes:
    """JSON without blanks."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def event(body: Json, name: str | None = None) -> bytes:
    """A server-sent event, named or not."""
    head = b"" if name is None else b"event: %s\n" % name.encode()
    return head + b"data: " + json_bytes(body) + b"\n\n"
