"""Every piece of text is told apart as it comes; the deltas summed are the whole answer, wherever the text is cut."""

import json
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_qwen.answer
from mlx_qwen.answer import AnswerStream, ToolCallDelta
from tests.answer.transcripts import TOOLS, call, parameter, parsed, read, stream, summed

READ_A = call("read", parameter("path", "a"))
SAMPLE = call("write", parameter("path", "b"), parameter("content", f"# Calls\n\n{READ_A}\n\nis one."))
PIECES = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=write>",
    "<function=read>",
    "<function=other>",
    "</function>",
    "<parameter=path>",
    "<parameter=content>",
    "<parameter=mode>",
    "<parameter=size/>",
    "</parameter>",
    "</parameter/>",
    '{"name": "read", "arguments": {"path": "',
    '{"name": "write", "arguments": {"path": "a", "content": "',
    '"}}',
    '", "mode": "',
    ', "mode": 5',
    "}",
    "\\n",
    "\\ud83d",
    "\\ude00",
    "STOP",
    "STO",
    "<",
    "\n",
    "\n",
    "\n",
    " ",
    "5",
    "words",
    "é",
)
TRANSCRIPT = st.lists(st.sampled_from((*PIECES, READ_A, SAMPLE)), max_size=24).map("".join)
SETTINGS = st.fixed_dictionaries(
    {
        "inside_thinking": st.booleans(),
        "tools": st.sampled_from([TOOLS, None]),
        "stop": st.sampled_from([(), ("STOP",), ("TOP\n", "STOP ")]),
        "stop_in_reasoning": st.booleans(),
        "thinking_is_limited": st.booleans(),
        "ended": st.booleans(),
    }
)


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@settings(deadline=None)
@given(TRANSCRIPT, SETTINGS, st.lists(st.integers(0, 400), max_size=40))
def test_any_cuts_give_the_same_deltas_summed(text: str, settings: dict[str, object], cuts: list[int]) -> None:
    expected, whole = stream([text], **settings)  # type: ignore[arg-type]
    for pieces in (cut(text, cuts), list(text)):
        deltas, answer = stream(pieces, **settings)  # type: ignore[arg-type]
        assert summed(deltas) == summed(expected)
        assert answer == whole


@settings(deadline=None)
@given(TRANSCRIPT, SETTINGS)
def test_the_deltas_summed_are_the_whole_answer(text: str, settings: dict[str, object]) -> None:
    deltas, whole = stream(list(text), **settings)  # type: ignore[arg-type]
    raw, content, reasoning, calls = summed(deltas)
    assert text.startswith(raw)
    assert content == whole.content
    assert (reasoning or None) == whole.reasoning
    complete = calls[: len(whole.tool_calls)]
    assert parsed(complete) == [(one.name, one.arguments) for one in whole.tool_calls]
    assert len(calls) - len(complete) <= (0 if settings["ended"] and not settings["stop"] else 1)


@settings(deadline=None)
@given(st.lists(st.sampled_from((*PIECES, "§", "¶ §")), max_size=24).map("".join))
def test_words_are_never_lost_nor_doubled(text: str) -> None:
    _, content, reasoning, calls = summed(stream([text])[0])
    kept = content + reasoning + "".join(arguments for _, arguments in calls)
    assert [kept.count(letter) for letter in "§¶"] == [text.count(letter) for letter in "§¶"]


def test_a_name_comes_as_soon_as_it_stands_and_text_in_pieces() -> None:
    answer = AnswerStream(inside_thinking=False, tools=TOOLS)
    assert answer.push("I write.\n\n<tool_call>\n<function=write>\n<param").tool_calls == ()
    assert answer.push("eter=content>").tool_calls == (ToolCallDelta(0, "write", '{"content": "'),)
    assert answer.push('\nA "word"').tool_calls == (ToolCallDelta(0, None, 'A \\"word\\"'),)
    assert answer.push(" more\n").tool_calls == (ToolCallDelta(0, None, " more"),)
    assert answer.push("</parameter>\n<parameter=mode>\n4").tool_calls == (ToolCallDelta(0, None, '", "mode": '),)
    assert answer.push("2\n</parameter>\n</function>").tool_calls == ()
    assert answer.push("\n</tool_call>").tool_calls == (ToolCallDelta(0, None, "42}"),)
    answer.finish()
    assert answer.answer("stop").content == "I write."


def test_a_call_in_json_stands_with_its_first_whole_argument_and_text_comes_in_pieces() -> None:
    answer = AnswerStream(inside_thinking=False, tools=TOOLS)
    assert answer.push('<tool_call>\n{"name": "write", "arguments": {"path": "a').tool_calls == ()
    assert answer.push('", ').tool_calls == (ToolCallDelta(0, "write", '{"path": "a"'),)
    assert answer.push('"content": "A \\"word').tool_calls == (ToolCallDelta(0, None, ', "content": "A \\"word'),)
    assert answer.push("\\").tool_calls == (ToolCallDelta(0, None, ""),)
    assert answer.push('" \\ud83d').tool_calls == (ToolCallDelta(0, None, '\\" '),)
    assert answer.push("\\ude00 <function=read> ").tool_calls == (ToolCallDelta(0, None, "😀 <function=read> "),)
    assert answer.push('", "mode": "').tool_calls == (ToolCallDelta(0, None, '"'),)
    assert answer.push('5"').tool_calls == ()
    assert answer.push("}}").tool_calls == (ToolCallDelta(0, None, ', "mode": 5}'),)
    assert answer.push("\n</tool_call>").tool_calls == ()
    answer.finish()
    expected = {"path": "a", "content": 'A "word" 😀 <function=read> ', "mode": 5}
    assert answer.answer("stop").tool_calls[0].arguments == expected


VALUES = st.recursive(
    st.text() | st.integers() | st.none() | st.sampled_from([f"x\n{READ_A}\ny", "\\", '"', "😀"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), st.booleans(), st.integers(1, 9))
def test_any_arguments_in_json_come_back_as_pythons_own_reader_gives_them(
    arguments: dict[str, object], ascii_only: bool, size: int
) -> None:
    body = json.dumps({"name": "any", "arguments": arguments}, ensure_ascii=ascii_only)
    text = f"<tool_call>\n{body}\n</tool_call>"
    deltas, whole = stream((text[at : at + size] for at in range(0, len(text), size)), tools=None)
    assert [(one.name, one.arguments) for one in whole.tool_calls] == [("any", arguments)]
    assert parsed(summed(deltas)[3]) == [("any", arguments)]


def test_an_answer_with_calls_ends_by_them_unless_the_limit_cut_it() -> None:
    assert stream([READ_A])[1].finish_reason == "tool_calls"
    assert stream(["Hello"])[1].finish_reason == "stop"
    assert stream([READ_A], ended=False)[1].finish_reason == "length"


def test_the_whole_answer_can_be_put_back_into_the_messages() -> None:
    message = stream([f"<think>\nHm.\n</think>\n\nI look.\n\n{READ_A}"])[1].message
    assert message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"type": "function", "function": {"name": "read", "arguments": {"path": "a"}}}],
    }


@pytest.mark.parametrize("ended", [True, False])
def test_a_call_in_a_block_that_never_closes_is_a_call(ended: bool) -> None:
    _, whole = stream(list(f"I need the file.\n{READ_A}\n"), inside_thinking=True, ended=ended)
    assert whole.reasoning == "I need the file."
    assert [one.name for one in whole.tool_calls] == ["read"]
    assert not whole.content.strip()


def test_a_sample_call_in_closed_reasoning_is_none() -> None:
    _, whole = stream(list(f"Like {READ_A}\nno.\n</think>\n\nNo."), inside_thinking=True)
    assert whole.reasoning == f"Like {READ_A}\nno."
    assert (whole.content, whole.tool_calls) == ("No.", ())


def test_reasoning_that_goes_on_behind_a_sample_until_the_limit_is_reasoning() -> None:
    _, whole = stream([f"Like {READ_A}\nor rath"], inside_thinking=True, ended=False)
    assert whole.reasoning == f"Like {READ_A}\nor rath"
    assert whole.tool_calls == ()


@pytest.mark.parametrize("text", ["Hm\n</think>\n\nso 4.\n</think>\n\nFour.", "Hm\n</think>\n\n</think>\n\nFour."])
def test_a_late_end_of_reasoning_behind_a_closed_block_is_not_shown(text: str) -> None:
    for pieces in ([text], list(text)):
        deltas, whole = stream(pieces, inside_thinking=True, thinking_is_limited=True)
        assert "</think>" not in whole.content
        assert whole.content.endswith("Four.")
        assert summed(deltas)[0] == text


def test_a_late_end_is_kept_where_nothing_closed_the_block_and_in_values() -> None:
    _, free = stream(["Hm\n</think>\n\nThe tag </think> ends it."], inside_thinking=True)
    assert free.content == "The tag </think> ends it."
    text = "\n</think>\n\n" + call("read", parameter("path", "</think>"))
    _, limited = stream([text], inside_thinking=True, thinking_is_limited=True)
    assert limited.tool_calls[0].arguments == {"path": "</think>"}


@pytest.mark.parametrize(
    "parts", ["content", "text value", "other value", "held value", "json", "reasoning", "open", "json text"]
)
def test_the_work_grows_with_the_text_and_not_with_its_square(parts: str) -> None:
    words = "some words, " * 4
    shapes: dict[str, Callable[[int], str]] = {
        "content": lambda n: words * n,
        "text value": lambda n: call("write", parameter("content", words * n)),
        "other value": lambda n: call("write", parameter("mode", words * n)),
        "held value": lambda n: call("write", parameter("content", f"</parameter> {words * n}")),
        "json": lambda n: '<tool_call>\n{"name": "read", "arguments": {"path": "' + words * n + '"}}\n</tool_call>',
        "json text": lambda n: (
            f'<tool_call>{{"name": "write", "arguments": {{"path": "a", "content": "{words * n}"}}}}'
        ),
        "reasoning": lambda n: f"<think>\n{READ_A}{words * n}",
        "open": lambda n: f"<tool_call>\n<function=write>\n<parameter=content>\n{words}" * n,
    }
    small, large = (work(shapes[parts](n)) for n in (60, 240))
    assert large < 4.6 * small


def work(text: str) -> int:
    """Letters that the parser's functions can look at: what each call is given, and what its object holds."""
    total = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal total
        if event == "call" and "mlx_qwen/answer" in frame.f_code.co_filename:
            seen = list(frame.f_locals.values())
            seen += list(vars(seen[0]).values()) if seen and hasattr(seen[0], "__dict__") else []
            total += 1 + sum(len(one) for one in seen if isinstance(one, str))

    pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
    answer = AnswerStream(inside_thinking=False, tools=TOOLS, stop=("never",))
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        for piece in pieces:
            answer.push(piece)
        answer.finish()
    finally:
        sys.setprofile(before)
    return total


def test_600_kilobytes_in_small_pieces_arrive_whole() -> None:
    content = "0123456789abcdef\n" * 36_000
    text = call("write", parameter("content", content))
    deltas, whole = stream(text[start : start + 4] for start in range(0, len(text), 4))
    assert whole.tool_calls[0].arguments == {"content": content}
    assert parsed(summed(deltas)[3]) == [("write", {"content": content})]


def test_answers_are_parsed_without_the_rest_of_the_package() -> None:
    folder = Path(mlx_qwen.answer.__file__).parent
    names = {
        word
        for file in folder.glob("*.py")
        for word in re.findall(r"(?:from|import) (mlx_qwen[\w.]*)", file.read_text(encoding="utf-8"))
    }
    assert len(names) > 10
    outside = {name for name in names if not name.startswith("mlx_qwen.answer")}
    assert outside == {"mlx_qwen.errors", "mlx_qwen.json_types"}


def test_the_fuzzed_transcripts_do_hold_calls() -> None:
    assert read(SAMPLE)[1] == [("write", {"path": "b", "content": f"# Calls\n\n{READ_A}\n\nis one."})]
