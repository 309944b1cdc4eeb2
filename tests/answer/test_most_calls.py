"""How many calls an answer may hold: the text is over behind the last of them, and with none it is all text."""

import pytest

from mlx_qwen.answer import AnswerStream
from mlx_qwen.answer.deltas import ParsedAnswer

CALL = "<tool_call>\n<function={}>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
TEXT = f"First.\n\n{CALL.format('one')}\n{CALL.format('two')}\nand more"


def read(text: str, size: int, most: int | None) -> tuple[str, ParsedAnswer]:
    """What was read of the text in pieces of a size until the answer was over, and what it says."""
    stream, given = AnswerStream(inside_thinking=False, most_calls=most), ""
    for start in range(0, len(text), size):
        given += text[start : start + size]
        stream.push(text[start : start + size])
        if stream.stopped:
            break
    stream.finish(ended=False)
    return given, stream.answer("stop")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_behind_the_last_call_that_may_come_the_answer_is_over(size: int) -> None:
    given, answer = read(TEXT, size, 1)
    assert [call.name for call in answer.tool_calls] == ["one"]
    assert answer.finish_reason == "tool_calls"
    assert answer.content.startswith("First.")
    if size == 1:
        assert given == TEXT[: TEXT.index("</tool_call>") + len("</tool_call>")]


def test_any_number_of_calls_may_come_unless_told(size: int = 5) -> None:
    _, answer = read(TEXT, size, None)
    assert [call.name for call in answer.tool_calls] == ["one", "two"]


@pytest.mark.parametrize("size", [1, 7])
def test_where_no_calls_may_come_they_are_text(size: int) -> None:
    given, answer = read(TEXT, size, 0)
    assert (given, answer.content, answer.tool_calls, answer.finish_reason) == (TEXT, TEXT, (), "stop")


def test_of_a_list_of_calls_in_json_the_first_counts() -> None:
    text = '<tool_call>\n[{"name": "one", "arguments": {}}, {"name": "two", "arguments": {}}]\n</tool_call>'
    _, answer = read(text, 4, 1)
    assert [call.name for call in answer.tool_calls] == ["one"]
