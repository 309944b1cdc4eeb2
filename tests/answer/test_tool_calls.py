"""Tool calls are read whole and typed, wherever the text is cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qwen.answer import ToolCallParser
from mlx_qwen.answer.tool_values import typed_value
from mlx_qwen.json_types import ToolCall

TOOL = {
    "type": "function",
    "function": {
        "name": "write",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string"},
                "lines": {"type": "integer"},
                "scale": {"type": "number"},
                "append": {"type": "boolean"},
                "options": {"type": "object"},
                "tags": {"type": "array"},
                "owner": {"type": ["integer", "null"]},
                "either": {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
            },
        },
    },
}


def parameter(key: str, value: str) -> str:
    return f"<parameter={key}>\n{value}\n</parameter>\n"


def call_text(name: str, *parameters: str) -> str:
    return f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>"


TEXT = (
    "Two calls, a < b: "
    + call_text("write", parameter("path", "1.5"), parameter("lines", "3"), parameter("append", "True"))
    + "\nand <tool "
    + call_text("stop")
    + " done <tool_c"
)
CALLS = [ToolCall("write", {"path": "1.5", "lines": 3, "append": True}), ToolCall("stop", {})]
OUTSIDE = "Two calls, a < b: \nand <tool  done <tool_c"


def parse(pieces: list[str], tools: object = (TOOL,)) -> tuple[str, list[ToolCall]]:
    parser = ToolCallParser(tools)  # type: ignore[arg-type]
    text = "".join(parser.push(piece) for piece in pieces) + parser.finish()
    return text, parser.calls


@pytest.mark.parametrize("cut", range(len(TEXT) + 1))
def test_every_cut_in_two_gives_the_same_calls_and_text(cut: int) -> None:
    assert parse([TEXT[:cut], TEXT[cut:]]) == (OUTSIDE, CALLS)


@given(st.lists(st.integers(0, len(TEXT)), max_size=40))
def test_any_cuts_give_the_same_calls_and_text(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(TEXT)]
    pieces = [TEXT[start:end] for start, end in pairwise(edges)]
    assert parse(pieces) == (OUTSIDE, CALLS)


def test_character_by_character_gives_the_same_calls_and_text() -> None:
    assert parse(list(TEXT)) == (OUTSIDE, CALLS)


def test_text_that_cannot_belong_to_a_call_is_not_held_back() -> None:
    assert ToolCallParser().push("if a < b") == "if a < b"


@pytest.mark.parametrize(
    "value",
    [
        "def f():\n    return '<b>'\n",
        "",
        "\n\nblank lines\n\n",
        "closing </parameter> inside",
        "</function></tool_call>",
        "a whole </function>\n</tool_cal",
    ],
)
def test_a_string_value_arrives_letter_for_letter(value: str) -> None:
    text = call_text("write", parameter("path", value), parameter("lines", "1"))
    assert parse([text])[1] == [ToolCall("write", {"path": value, "lines": 1})]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lines", "-7", -7),
        ("lines", "many", "many"),
        ("scale", "2.5", 2.5),
        ("scale", "2", 2),
        ("scale", "nan", "nan"),
        ("append", "True", True),
        ("append", "false", False),
        ("append", "1", "1"),
        ("options", '{"a": [1, null]}', {"a": [1, None]}),
        ("options", "{'a': True}", {"a": True}),
        ("options", "[1]", "[1]"),
        ("tags", '["x", 2]', ["x", 2]),
        ("owner", "None", None),
        ("owner", "12", 12),
        ("either", "true", True),
        ("either", "maybe", "maybe"),
        ("path", "true", "true"),
        ("unlisted", "5", "5"),
    ],
)
def test_values_take_the_type_that_the_schema_gives(key: str, text: str, value: object) -> None:
    schema = TOOL["function"]["parameters"]["properties"].get(key)  # type: ignore[index]
    typed = typed_value(text, schema)
    assert typed == value
    assert type(typed) is type(value)


def test_without_a_schema_values_stay_strings() -> None:
    assert parse([call_text("write", parameter("lines", "3"))], tools=None)[1] == [ToolCall("write", {"lines": "3"})]


def test_a_call_that_only_lacks_its_last_tag_counts() -> None:
    text = call_text("write", parameter("lines", "3")).removesuffix("</tool_call>")
    assert parse([text]) == ("", [ToolCall("write", {"lines": 3})])


@pytest.mark.parametrize("text", ["<tool_call>\n<function=write>\n<param", "<tool_call>nothing</tool_call> after"])
def test_a_block_that_is_no_call_is_given_back_as_text(text: str) -> None:
    assert parse(list(text)) == (text, [])


def test_the_json_form_of_qwen3_next_is_read_too() -> None:
    text = '<tool_call>\n{"name": "write", "arguments": {"lines": 3}}\n</tool_call>'
    assert parse(list(text)) == ("", [ToolCall("write", {"lines": 3})])
