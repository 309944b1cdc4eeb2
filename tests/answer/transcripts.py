"""Tools, and pieces of transcripts in Qwen3.5's format, that the tests of this folder share."""

import json
from collections.abc import Iterable

from mlx_qwen.answer import AnswerDelta, AnswerStream, ParsedAnswer
from mlx_qwen.json_types import Json


def tool(name: str, **properties: object) -> dict[str, object]:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


TEXT, INTEGER = {"type": "string"}, {"type": "integer"}
WRITE = tool("write", path=TEXT, content=TEXT, mode=INTEGER)
READ = tool("read", path=TEXT)
TOOLS = (WRITE, READ)


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def call(name: str, *parameters: str) -> str:
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


def stream(pieces: Iterable[str], *, ended: bool = True, **settings: object) -> tuple[list[AnswerDelta], ParsedAnswer]:
    """All deltas of an answer that arrives in these pieces, and the whole."""
    settings = {"inside_thinking": False, "tools": TOOLS, **settings}
    answer = AnswerStream(**settings)  # type: ignore[arg-type]
    deltas = [answer.push(piece) for piece in pieces]
    deltas.append(answer.finish(ended=ended))
    return deltas, answer.answer("stop" if ended or answer.stopped else "length")


def read(text: str, *, ended: bool = True, **settings: object) -> tuple[str, list[tuple[str, dict[str, Json]]]]:
    """Content and calls of a whole text."""
    _, whole = stream([text], ended=ended, **settings)
    return whole.content, [(one.name, one.arguments) for one in whole.tool_calls]


def summed(deltas: list[AnswerDelta]) -> tuple[str, str, str, list[tuple[str | None, str]]]:
    """Text, content, reasoning, and each call's name and arguments as JSON text, put together as a client does."""
    names = {one.index: one.name for delta in deltas for one in delta.tool_calls if one.name is not None}
    pieces: dict[int, list[str]] = {}
    for delta in deltas:
        for one in delta.tool_calls:
            pieces.setdefault(one.index, []).append(one.arguments)
    assert list(pieces) == list(range(len(names)))
    text, content, reasoning = (
        "".join(part) for part in zip(*((one.text, one.content, one.reasoning) for one in deltas), strict=True)
    )
    return text, content, reasoning, [(names[index], "".join(pieces[index])) for index in pieces]


def parsed(calls: list[tuple[str | None, str]]) -> list[tuple[str | None, Json]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]
