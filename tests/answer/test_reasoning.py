"""Reasoning and answer come apart at the tag, wherever the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qwen.answer import AnswerStream, ReasoningSplitter
from mlx_qwen.json_types import ToolCall

CASES = {
    "closed": (True, "\n\nFirst </th\nthen.\n</think>\n\nThe\n\nanswer\n", ("First </th\nthen.", "The\n\nanswer\n")),
    "unfinished": (True, "still\nthinking </thin", ("still\nthinking </thin", "")),
    "opened by the model": (False, " \n<think>\nHm.\n</think>\nYes", ("Hm.", "Yes")),
    "never opened": (False, "\n<thin air> </think> Yes\n", ("", "\n<thin air> </think> Yes\n")),
    "empty block": (True, "\n</think>\n\nYes", ("", "Yes")),
    "only a tag's start": (False, "<thi", ("", "<thi")),
}


def split(pieces: list[str], *, inside: bool) -> tuple[str, str]:
    splitter = ReasoningSplitter(inside=inside)
    parts = [splitter.push(piece) for piece in pieces] + [splitter.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.answer for part in parts)


@pytest.mark.parametrize("case", CASES)
def test_every_cut_in_two_gives_the_same_parts(case: str) -> None:
    inside, text, expected = CASES[case]
    for cut in range(len(text) + 1):
        assert split([text[:cut], text[cut:]], inside=inside) == expected
    assert split(list(text), inside=inside) == expected


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 60), max_size=20))
def test_any_cuts_give_the_same_parts(case: str, cuts: list[int]) -> None:
    inside, text, expected = CASES[case]
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert split([text[a:b] for a, b in pairwise(edges)], inside=inside) == expected


def test_reasoning_streams_before_the_block_is_closed() -> None:
    assert ReasoningSplitter(inside=True).push("A thought").reasoning == "A thought"


def test_a_tool_call_counts_in_the_answer_and_not_in_the_reasoning() -> None:
    call = "<tool_call>\n<function={}>\n</function>\n</tool_call>"
    stream = AnswerStream(inside_thinking=True)
    for character in f"Maybe {call.format('a')}.\n</think>\n\nNow {call.format('b')}":
        stream.push(character)
    stream.finish()
    parser = stream.answer("stop")
    assert parser.tool_calls == (ToolCall("b", {}),)
    assert parser.content == "Now "
    assert parser.reasoning == f"Maybe {call.format('a')}."
