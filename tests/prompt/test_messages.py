"""Messages are repaired where the meaning is clear and refused, by name, where it is not."""

import pytest

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import ToolCall
from mlx_qwen.prompt.messages import prepare_messages, prepare_tools

USER = {"role": "user", "content": "Hi"}


def assistant_call(arguments: object) -> dict[str, object]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def arguments_of(message: dict[str, object]) -> object:
    return message["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]


@pytest.mark.parametrize(("given", "expected"), [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {})])
def test_tool_arguments_become_an_object(given: object, expected: object) -> None:
    assert arguments_of(prepare_messages([USER, assistant_call(given)])[1]) == expected


@pytest.mark.parametrize("given", ["{broken", "[1]", [1], 3])
def test_tool_arguments_that_are_no_object_are_refused(given: object) -> None:
    with pytest.raises(PromptError, match="Message 1, tool call f: arguments"):
        prepare_messages([USER, assistant_call(given)])


def test_the_callers_messages_are_left_as_they_are() -> None:
    call = assistant_call('{"a": 1}')
    prepare_messages([USER, call])
    assert arguments_of(call) == '{"a": 1}'


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"text": "two "}, "three"]
    assert prepare_messages([{"role": "user", "content": parts}])[0]["content"] == "one two three"


@pytest.mark.parametrize("kind", ["audio", "input_audio"])
def test_audio_is_refused_by_kind(kind: str) -> None:
    with pytest.raises(PromptError, match=f"Message 0 .user. holds {kind} content.*text, images and videos"):
        prepare_messages([{"role": "user", "content": [{"type": kind, kind: "cat.mp3"}]}])


def test_an_unknown_role_is_named_with_the_known_ones() -> None:
    with pytest.raises(
        PromptError, match="Message 1 has role 'bot'; expected one of system, developer, user, assistant, tool"
    ):
        prepare_messages([USER, {"role": "bot", "content": "Hi"}])


@pytest.mark.parametrize(("message", "complaint"), [("Hi", "is a str"), ({"role": "user", "content": b"x"}, "bytes")])
def test_a_malformed_message_is_described(message: object, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        prepare_messages([message])  # type: ignore[list-item]


def test_no_messages_are_refused() -> None:
    with pytest.raises(PromptError, match="empty"):
        prepare_messages([])


def test_other_names_for_reasoning_are_understood() -> None:
    message = {"role": "assistant", "content": "4", "thinking": "2+2"}
    assert prepare_messages([USER, message])[1]["reasoning_content"] == "2+2"


def test_a_tool_that_is_no_json_description_is_refused() -> None:
    with pytest.raises(PromptError, match="Tool 0 is a builtin_function_or_method"):
        prepare_tools([print])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "tool", [{}, {"type": "function"}, {"function": {"parameters": {}}}, {"name": ""}, {"function": {"name": 3}}]
)
def test_a_tool_without_a_name_is_refused(tool: dict[str, object]) -> None:
    with pytest.raises(PromptError, match="Tool 1 has no name"):
        prepare_tools([{"name": "f"}, tool])


def test_what_an_answer_holds_is_put_back_as_it_came() -> None:
    calls = (ToolCall("f", {"n": [4, None]}), ToolCall("g", {}))
    message = {"role": "assistant", "content": "", "reasoning": None, "tool_calls": calls}
    found = prepare_messages([USER, message, {"role": "tool", "content": "5"}])[1]
    assert found["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"n": [4, None]}}},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert "reasoning_content" not in found
