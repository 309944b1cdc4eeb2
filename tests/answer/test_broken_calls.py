"""Calls whose tags a model forgot, doubled or only mentioned: none is swallowed, none holds another's, words stay."""

import json

import pytest

from mlx_qwen.answer import ToolCallParser
from mlx_qwen.json_types import Json
from tests.answer.transcripts import READ, TOOLS, WRITE, call, parameter, read, stream, tool

READ_A, READ_B = (call("read", parameter("path", name)) for name in "ab")
A, B = ("read", {"path": "a"}), ("read", {"path": "b"})
OPEN = "<tool_call>\n<function=write>\n<parameter=path>\n1"
ONE = ("write", {"path": "1"})
CLOSINGS = ("</parameter>", "</function>", "</tool_call>")


def whichever_way(text: str, **settings: object) -> tuple[str, list[tuple[str, dict[str, Json]]]]:
    """Content and calls, which are the same letter by letter."""
    result = read(text, **settings)  # type: ignore[arg-type]
    _, slowly = stream(list(text), **settings)  # type: ignore[arg-type]
    assert (slowly.content, [(one.name, one.arguments) for one in slowly.tool_calls]) == result
    return result


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("kept", [tuple(tag for at, tag in enumerate(CLOSINGS) if n >> at & 1) for n in range(8)])
def test_closing_tags_may_be_missing_before_the_next_calls(kept: tuple[str, ...], ended: bool) -> None:
    closed = "".join(f"\n{tag}" for tag in kept)
    assert whichever_way(f"{OPEN}{closed}\n{READ_A}", ended=ended) == ("", [ONE, A])
    assert whichever_way(f"{OPEN}{closed}\n{READ_A}\n{READ_B}", ended=ended) == ("", [ONE, A, B])
    assert whichever_way(f"{READ_A}\n{OPEN}{closed}\n{READ_B}", ended=ended) == ("", [A, ONE, B])


@pytest.mark.parametrize("kept", [tuple(tag for at, tag in enumerate(CLOSINGS) if n >> at & 1) for n in range(8)])
def test_what_the_model_left_open_at_its_end_is_closed(kept: tuple[str, ...]) -> None:
    assert whichever_way(OPEN + "".join(f"\n{tag}" for tag in kept)) == ("", [ONE])


def test_a_call_that_the_limit_cut_is_text() -> None:
    for text in (
        OPEN,
        f"{OPEN}\n</parameter>\n",
        f"{OPEN}\n</parameter>\n<parameter=content>\nhalf a </function> file",
    ):
        content, calls = whichever_way(text, ended=False)
        assert (content, calls) == (text, [])


def test_many_calls_that_are_never_closed_all_arrive() -> None:
    assert whichever_way("\n".join([OPEN] * 9 + [READ_A])) == ("", [ONE] * 9 + [A])


@pytest.mark.parametrize("closing", ["</parameter>\n</parameter>", "</parameter/>", "<parameter/>", "</parameter />"])
def test_a_closing_tag_may_be_doubled_or_close_itself(closing: str) -> None:
    text = f"{OPEN}\n{closing}\n<parameter=mode>\n2\n{closing}\n</function>\n</tool_call>"
    assert whichever_way(f"{text}\n{READ_A}") == ("", [("write", {"path": "1", "mode": 2}), A])


def test_a_parameter_may_begin_without_the_last_ones_end_or_close_itself() -> None:
    expected = [("write", {"path": "1", "mode": 2})]
    end = "<parameter=mode>\n2\n</parameter>\n</function>\n</tool_call>"
    assert whichever_way(f"<tool_call>\n<function=write>\n<parameter=path>\n1\n{end}") == ("", expected)
    inline = "<tool_call><function=write><parameter=path>1<parameter=mode>2</parameter></function></tool_call>"
    assert whichever_way(inline) == ("", expected)
    itself = f"<tool_call>\n<function=write>\n<parameter=path/>\n{end}"
    assert whichever_way(itself) == ("", [("write", {"path": "", "mode": 2})])


def test_the_opening_tag_may_be_missing_for_a_tool_that_was_given() -> None:
    bare = READ_A.removeprefix("<tool_call>\n")
    assert whichever_way(f"I look.\n{bare}\n{READ_B}") == ("I look.", [A, B])
    assert whichever_way(bare.removesuffix("\n</tool_call>")) == ("", [A])
    other = bare.replace("read", "other")
    assert whichever_way(other) == (other, [])


def test_tags_in_prose_stay_and_the_call_behind_them_arrives() -> None:
    prose = "Write <tool_call>, then <function=NAME> and </tool_call>; `<parameter=path>` names one.\n"
    assert whichever_way(prose + READ_A) == (prose.rstrip("\n"), [A])


def test_prose_between_the_tags_stays_prose() -> None:
    text = (
        "<tool_call>\nFirst\n<function=write>\nsecond\n<parameter=path>\n1\n</parameter>\nthird\n"
        "<parameter=mode>\n2\n</parameter>\n</function>\nfourth\n</tool_call>\nfifth"
    )
    content, calls = whichever_way(text)
    assert content.split() == ["First", "second", "third", "fourth", "fifth"]
    assert calls == [("write", {"path": "1", "mode": 2})]


@pytest.mark.parametrize(
    "sample",
    [
        READ_A,
        call("write", parameter("path", "x"), parameter("content", "y")),
        call("unknown", parameter("path", "x")),
        f"{READ_A}\n{READ_B}",
        '<tool_call>\n{"name": "read", "arguments": {}}\n</tool_call>',
        READ_A.removeprefix("<tool_call>\n"),
        "<tool_call>\n<function=unknown>\n",
        "x\n</parameter>\n<parameter=unknown>\ny",
        "mentions <tool_call> and </function></tool_call> and </parameter> only",
    ],
)
def test_a_value_that_holds_a_whole_call_comes_back_exactly(sample: str) -> None:
    value = f"# How to call\n{sample}\nThat is all."
    text = call("write", parameter("path", "doc.md"), parameter("content", value))
    assert whichever_way(f"{text}\n{READ_B}") == ("", [("write", {"path": "doc.md", "content": value}), B])


def test_a_name_that_no_schema_has_is_a_parameter_where_a_value_is_no_text() -> None:
    text = call("write", parameter("mode", "2"), parameter("force", "yes"))
    assert whichever_way(text) == ("", [("write", {"mode": 2, "force": "yes"})])


ASKED = {"path": "a <function=read> </tool_call> b", "mode": 3}


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"name": "write", "arguments": ASKED}),
        json.dumps({"name": "write", "parameters": ASKED}),
        json.dumps({"name": "write", "arguments": json.dumps(ASKED)}),
        json.dumps({"name": "write", "arguments": {**ASKED, "mode": "3"}}),
        json.dumps({"type": "function", "function": {"name": "write", "arguments": ASKED}}),
        json.dumps([{"name": "write", "arguments": ASKED}]),
        json.dumps({"name": "write", "arguments": ASKED})[:-1],
    ],
)
def test_the_json_form_is_read_in_its_kinds(body: str) -> None:
    asked = ("write", ASKED)
    assert whichever_way(f"So:\n<tool_call>\n{body}\n</tool_call>\n{READ_A}") == ("So:", [asked, A])
    assert whichever_way(f"<tool_call>\n{body}\n{READ_A}") == ("", [asked, A])


def test_two_objects_in_one_block_are_two_calls() -> None:
    one, two = (json.dumps({"name": "read", "arguments": {"path": name}}) for name in "ab")
    for between in ("\n", ",\n", ""):
        assert whichever_way(f"<tool_call>\n{one}{between}{two}\n</tool_call> done") == (" done", [A, B])


@pytest.mark.parametrize("body", ['{"name": "read", "arguments": {"path": "a}}', '{"name": 3}', '{"a" <b>}', "[1]"])
@pytest.mark.parametrize("line", ["\n", ""])
def test_json_that_is_no_call_is_text_and_swallows_none(body: str, line: str) -> None:
    text = f"<tool_call>{line}{body}{line}</tool_call>"
    assert whichever_way(f"{text} then\n{READ_B}") == (f"{text} then", [B])


STANDS = '<tool_call>\n{"name": "write", "arguments": {"path": "1", '


@pytest.mark.parametrize(
    ("rest", "added", "words"),
    [
        ("<b>}}\n</tool_call>", {}, "<b>}}"),
        ('"content": "b\n</tool_call>', {"content": "b\n"}, ""),
        ('"content": "b \\x c"}}\n</tool_call>', {"content": "b "}, '\\x c"}}'),
        ('"mode": 2}, words}\n</tool_call>', {"mode": 2}, ", words}"),
        ('"mode": "2"\n', {"mode": 2}, ""),
        ('"content": "b', {"content": "b\n"}, ""),
    ],
)
def test_json_that_breaks_behind_a_whole_argument_is_closed_and_the_rest_is_text(
    rest: str, added: dict[str, Json], words: str
) -> None:
    content, calls = whichever_way(f"{STANDS}{rest}\n{READ_A}")
    assert calls == [("write", {"path": "1", **added}), A]
    assert content.strip() == words


def test_a_call_in_json_that_the_limit_cut_is_text() -> None:
    for text in (
        STANDS,
        f'{STANDS}"content": "half',
        f'{STANDS}"mode": 3',
        '<tool_call>{"name": "read", "arguments": {}',
    ):
        assert whichever_way(text, ended=False) == (text, [])


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strin"},
        {"type": 5},
        {"type": []},
        {"properties": {"x": 5}},
        {"properties": {"x": {"type": "strin"}}},
        {"properties": ["x"]},
        {"properties": {"x": {"enum": 5}}},
        {"properties": {"x": {"anyOf": {}}}},
        {"properties": {"x": {"oneOf": []}}},
        {"properties": {"x": {"$ref": "#/$defs/nowhere"}}},
        {"properties": {"x": {"pattern": "["}}},
        {"properties": {"x": {"minimum": "1"}}},
        {"properties": {"x": {"multipleOf": 0}}},
        {"properties": {"x": {"$ref": "#/properties/x"}}},
        {"properties": {"x": {"items": {"allOf": [{"$ref": "#/properties/x/items"}]}}}},
        {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "properties": {"x": {"$ref": "#/$defs/a"}}},
    ],
)
def test_a_schema_that_makes_no_sense_is_refused_by_the_tools_name(schema: dict[str, object]) -> None:
    from mlx_qwen.errors import PromptError

    with pytest.raises(PromptError, match="Tool broken"):
        ToolCallParser([READ, {"function": {"name": "broken", "parameters": schema}}])


@pytest.mark.parametrize("form", ["parameters", "input_schema"])
def test_tools_are_read_in_openais_forms_and_in_anthropics(form: str) -> None:
    schema = WRITE["function"]["parameters"]  # type: ignore[index]
    text = call("write", parameter("mode", "4"))
    assert read(text, tools=[{"name": "write", form: schema}]) == ("", [("write", {"mode": 4})])


def test_names_of_parameters_are_found_wherever_a_schema_is_put_together_from() -> None:
    integer = {"type": "integer"}
    schema = {
        "$ref": "#/$defs/base",
        "$defs": {"base": {"properties": {"a": integer}}},
        "allOf": [{"properties": {"b": integer}}],
        "anyOf": [{"properties": {"c": integer}}, {"properties": {"c": {"type": "null"}, "d": integer}}],
    }
    text = call("put", *(parameter(name, "5") for name in "abcd"), parameter("e", "5"))
    tools = [{"name": "put", "parameters": schema}]
    assert read(text, tools=tools) == ("", [("put", {"a": 5, "b": 5, "c": 5, "d": 5, "e": "5"})])


def test_the_tools_of_these_tests_are_the_usual_form() -> None:
    assert tool("read", path={"type": "string"}) == READ
    assert READ in TOOLS
