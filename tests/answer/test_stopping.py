"""The stop string that begins first in the text ends the answer, however tokens cut it."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_qwen.answer.reasoning import ReasoningEnd
from mlx_qwen.answer.stopping import StopStrings
from tests.answer.transcripts import stream, summed

LETTERS = st.text(st.sampled_from("abc"), max_size=12)


@example(["abc", "c"], ["abcc", "bc"])
@example(["abc", "a"], ["abcc", "bc"])
@settings(deadline=None)
@given(st.lists(LETTERS, max_size=8), st.lists(st.text(st.sampled_from("abc"), min_size=1, max_size=5), max_size=3))
def test_the_text_before_the_first_stop_string_passes_whatever_the_cuts(pieces: list[str], strings: list[str]) -> None:
    stop = StopStrings(strings)
    passed = ""
    for piece in pieces:
        passed += stop.push(piece)
    passed += stop.finish()
    text = "".join(pieces)
    found = [text.index(string) for string in strings if string in text]
    assert passed == text[: min(found, default=len(text))]
    assert stop.reached == bool(found)


def test_text_that_can_be_no_stop_string_is_not_held_back() -> None:
    assert StopStrings(["abc"]).push("some text a") == "some text "


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("x\n <"), max_size=4) | st.sampled_from(["<think>", "</think>"]), max_size=9))
def test_reasoning_passes_unsearched_and_is_found_as_the_parser_finds_it(pieces: list[str]) -> None:
    for inside in (True, False):
        end = ReasoningEnd(inside=inside)
        cut = [end.push(piece) for piece in pieces]
        passed, rest = "".join(one for one, _ in cut), "".join(one for _, one in cut)
        text = "".join(pieces)
        opened = inside or text.lstrip().startswith("<think>")
        expected = len(text) if opened else 0
        if opened and "</think>" in text:
            expected = text.index("</think>") + len("</think>")
        held = end.finish()
        assert passed + rest + held == text
        assert len(passed) == expected


def test_a_stop_string_counts_behind_the_reasoning_only_unless_asked() -> None:
    text = "First.\nEND\n</think>\n\nAn answer. END of it"
    for pieces in ([text], list(text)):
        deltas, whole = stream(pieces, inside_thinking=True, stop=("END",))
        assert (whole.reasoning, whole.content) == ("First.\nEND", "An answer. ")
        assert summed(deltas)[0] == text[: text.rindex("END")]
        _, asked = stream(pieces, inside_thinking=True, stop=("END",), stop_in_reasoning=True)
        assert (asked.reasoning, asked.content) == ("First.", "")


def test_a_call_that_a_stop_string_cuts_is_none() -> None:
    text = "<tool_call>\n<function=read>\n<parameter=path>\nsome END"
    _, whole = stream([text], stop=("END",))
    assert whole.tool_calls == ()
    assert whole.content == text.removesuffix("END")
