"""The same conversation, said in each protocol, is the same prompt; the SDKs' own types say what the protocols are."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import anthropic.types as anthropic
import openai.types.chat as chat
import openai.types.responses as responses
import pytest
from pydantic import TypeAdapter

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Messages, ToolCall
from mlx_qwen.media.grids import Kind
from mlx_qwen.prompt.media_parts import Media, message_media
from mlx_qwen.prompt.messages import function_tools, prepare_messages, prepare_tools
from mlx_qwen.prompt.shapes import standard_messages
from tests.prompt.test_chat_template import processor, reference

PIXEL = "iVBORw0KGgo="
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
FUNCTION = {"name": "weather", "description": "Looks it up.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
ARGUMENTS = {"city": "Köln", "days": 2}
STANDARD = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": "A moment.",
        "reasoning_content": "Look it up.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "20 degrees"},
    {"role": "assistant", "content": "20."},
    {"role": "user", "content": "And tomorrow?"},
]
CHAT = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "text", "text": "How warm "}, {"type": "text", "text": "is it?"}]},
    {
        "role": "assistant",
        "content": "A moment.",
        "reasoning": "Look it up.",
        "refusal": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "20 degrees"}]},
    {"role": "assistant", "content": "20.", "tool_calls": []},
    {"role": "user", "content": "And tomorrow?"},
]
RESPONSES = [
    {"role": "system", "content": [{"type": "input_text", "text": "Be brief."}]},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How warm is it?"}]},
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Look it up."}],
        "encrypted_content": "gAAAA",
    },
    {
        "type": "message",
        "id": "msg_1",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "A moment.", "annotations": []}],
    },
    {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": json.dumps(ARGUMENTS)},
    {"type": "function_call_output", "call_id": "c1", "output": "20 degrees"},
    {"role": "assistant", "content": "20."},
    {"role": "user", "content": "And tomorrow?"},
]
ANTHROPIC = [
    {
        "role": "system",
        "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    },
    {"role": "user", "content": "How warm is it?"},
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "Look it up.", "signature": "EqQB"},
            {"type": "redacted_thinking", "data": "EmwK"},
            {"type": "text", "text": "A moment."},
            {"type": "tool_use", "id": "c1", "name": "weather", "input": ARGUMENTS},
        ],
    },
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "20 degrees"}]},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "20."}]},
    {"role": "user", "content": [{"type": "text", "text": "And tomorrow?"}]},
]
HUGGING_FACE = [
    *STANDARD[:2],
    {
        "role": "assistant",
        "content": "A moment.",
        "thinking": "Look it up.",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "name": "weather", "content": "20 degrees"},
    *STANDARD[4:],
]
OURS = [
    *STANDARD[:2],
    {
        "role": "assistant",
        "content": "A moment.",
        "reasoning": "Look it up.",
        "tool_calls": (ToolCall("weather", {"city": "Köln", "days": 2}),),
    },
    {"role": "tool", "content": "20 degrees"},
    {"role": "assistant", "content": "20.", "reasoning": None, "tool_calls": ()},
    *STANDARD[5:],
]
PROTOCOLS: dict[str, Sequence[Mapping[str, Any]]] = {
    "chat": CHAT,
    "responses": RESPONSES,
    "anthropic": ANTHROPIC,
    "hugging face": HUGGING_FACE,
    "ours": OURS,
    "chat, then anthropic": [*CHAT[:2], *ANTHROPIC[2:]],
    "responses, then chat": [*RESPONSES[:6], *CHAT[4:]],
    "anthropic, then responses": [*ANTHROPIC[:3], *RESPONSES[5:]],
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_conversation_is_the_same_prompt_in_every_protocol(protocol: str) -> None:
    expected = reference().apply_chat_template(
        STANDARD, tools=[TOOL], tokenize=False, add_generation_prompt=True, preserve_thinking=True
    )
    assert "Look it up." in expected
    found = processor().apply_chat_template(PROTOCOLS[protocol], tools=[TOOL], preserve_thinking=True)
    assert found == expected


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_in_the_one_shape_stays_as_it_is(protocol: str) -> None:
    once = standard_messages(PROTOCOLS[protocol])
    assert standard_messages(once) == once
    assert prepare_messages(once) == once


def test_the_conversations_are_what_the_sdks_send() -> None:
    plain = [{key: value for key, value in message.items() if key != "reasoning"} for message in CHAT]
    TypeAdapter(list[chat.ChatCompletionMessageParam]).validate_python(plain)
    TypeAdapter(list[responses.ResponseInputItemParam]).validate_python(RESPONSES)
    TypeAdapter(list[anthropic.MessageParam]).validate_python(ANTHROPIC[1:])


def test_objects_of_the_sdks_are_taken_as_they_come() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(ARGUMENTS)}}
    from_openai = chat.ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": "A moment.", "reasoning_content": "Look it up.", "tool_calls": [call]}
    )
    blocks = TypeAdapter(list[anthropic.ContentBlock]).validate_python(ANTHROPIC[2]["content"])
    items = TypeAdapter(list[responses.ResponseOutputItem]).validate_python(
        [*RESPONSES[2:4], {**RESPONSES[4], "status": "completed"}]
    )
    for answer in ([from_openai], [{"role": "assistant", "content": blocks}], items):
        found = standard_messages([*STANDARD[:2], *answer, *STANDARD[3:]])  # type: ignore[list-item]
        assert found[2]["tool_calls"] == STANDARD[2]["tool_calls"]
        assert (found[2]["content"], found[2]["reasoning_content"]) == ("A moment.", "Look it up.")
        assert len(found) == len(STANDARD)


def test_results_among_a_users_parts_become_messages_in_their_order() -> None:
    content = [
        {"type": "text", "text": "First"},
        {"type": "tool_result", "tool_use_id": "a", "content": "1"},
        {"type": "tool_result", "tool_use_id": "b", "is_error": True},
        {"type": "text", "text": "Then "},
        {"type": "text", "text": "this"},
    ]
    found = standard_messages([{"role": "user", "content": content}])
    assert [(one["role"], one["content"], one.get("tool_call_id")) for one in found] == [
        ("user", "First", None),
        ("tool", "1", "a"),
        ("tool", "", "b"),
        ("user", "Then this", None),
    ]


IMAGES = {
    "anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
    "anthropic_url": {"type": "image", "source": {"type": "url", "url": f"data:image/png;base64,{PIXEL}"}},
    "chat": {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}", "detail": "low"}},
    "responses": {"type": "input_image", "image_url": f"data:image/png;base64,{PIXEL}", "detail": "auto"},
    "hugging_face": {"type": "image", "url": f"data:image/png;base64,{PIXEL}"},
}


@pytest.mark.parametrize("protocol", IMAGES)
def test_images_of_every_protocol_are_found_in_results_too(protocol: str) -> None:
    image, mark = IMAGES[protocol], {"cache_control": {"type": "ephemeral"}}
    shot = [{"type": "text", "text": "A shot:"}, {**image, **(mark if protocol == "anthropic" else {})}]
    messages: Messages = [
        {"role": "user", "content": [image, "What is this?"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": shot}]},
        {"type": "function_call_output", "call_id": "b", "output": shot},
        {"role": "tool", "tool_call_id": "c", "content": shot},
    ]
    standard = standard_messages(messages)
    assert message_media(standard) == [Media(Kind.IMAGE, f"data:image/png;base64,{PIXEL}")] * 4
    assert standard_messages(standard) == standard
    assert [one["role"] for one in standard] == ["user", "tool", "tool", "tool"]
    assert prepare_messages(messages)[1]["content"] == [{"type": "text", "text": "A shot:"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"degrees": 20}, '{"degrees": 20}'),
        ([1, {"a": "ü"}], '[1, {"a": "ü"}]'),
        (20, "20"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, "b"], "ab"),
    ],
)
def test_what_a_tool_returns_may_be_any_json(content: object, expected: str) -> None:
    message = {"role": "tool", "tool_call_id": "c", "content": content}
    assert standard_messages([message]) == [{**message, "content": expected}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
def test_no_content_is_an_empty_text(role: str) -> None:
    empty = [
        {"role": role},
        {"role": role, "content": None},
        {"role": role, "content": []},
        {"role": role, "content": ""},
    ]
    assert standard_messages(empty) == [{"role": role, "content": ""}] * 4


def test_calls_of_older_and_freer_forms_are_calls() -> None:
    found = standard_messages(
        [
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "f", "content": "1"},
            {"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"a": 1}}]},
            {"type": "custom_tool_call", "call_id": "c", "name": "patch", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "c", "output": "Done"},
        ]
    )
    calls = [[call["function"] for call in one.get("tool_calls", ())] for one in found]  # type: ignore[attr-defined]
    assert calls == [
        [{"name": "f", "arguments": {"a": 1}}],
        [],
        [{"name": "f", "arguments": {"a": 1}}, {"name": "patch", "arguments": {"input": "*** Begin"}}],
        [],
    ]
    assert [one["role"] for one in found] == ["assistant", "tool", "assistant", "tool"]


def test_parallel_calls_of_items_are_one_message() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Both."}]}
    output = {"type": "function_call_output", "output": "1"}
    found = standard_messages(
        [{**thought}, {**call, "call_id": "a"}, {**call, "call_id": "b"}, {**output, "call_id": "a"}, thought, thought]
    )
    assert [one["role"] for one in found] == ["assistant", "tool", "assistant"]
    assert found[0]["reasoning_content"] == "Both."
    assert [call["id"] for call in found[0]["tool_calls"]] == ["a", "b"]  # type: ignore[attr-defined]
    assert found[2] == {"role": "assistant", "content": "", "reasoning_content": "Both.\n\nBoth."}


def test_an_item_of_reasoning_that_holds_no_text_leaves_no_message() -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    assert standard_messages([sealed, {"role": "user", "content": "Hi"}]) == [{"role": "user", "content": "Hi"}]


def test_documents_that_hold_text_are_read() -> None:
    plain = {
        "type": "document",
        "title": "Notes",
        "source": {"type": "text", "media_type": "text/plain", "data": "one"},
    }
    blocks = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "two"}]}}
    found = {"type": "search_result", "title": "T", "source": "u", "content": [{"type": "text", "text": "three"}]}
    message = {"role": "user", "content": [plain, blocks, found]}
    assert standard_messages([message])[0]["content"] == "Notes\nonetwoT\nthree"
    with pytest.raises(PromptError, match="Message 0 holds a document that is no text"):
        standard_messages(
            [{"role": "user", "content": [{"type": "document", "source": {"type": "base64", "data": ""}}]}]
        )


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"type": "web_search_call", "id": "ws"}, "Message 1 has role None and type 'web_search_call'"),
        (
            {"role": "user", "content": [{"type": "input_file", "file_id": "f"}]},
            "Message 1 .user. holds a content part",
        ),
        ({"role": "user", "content": {"no": "part"}}, "Message 1 .user. holds a content part"),
        ({"role": "tool", "content": {"picture": b"x"}}, "Message 1 .tool. returns a dict; expected text or JSON"),
        ({"role": "assistant", "tool_calls": "f"}, "Message 1 has tool_calls that are not a list"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "Message 1 has a tool call without"),
        ({"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]}, "Message 1"),
        (
            {"role": "user", "content": [{"type": "image", "source": {"type": "base64"}, "url": "a"}]},
            "keep one of them",
        ),
    ],
)
def test_what_is_of_no_known_kind_is_named_with_its_place(message: dict[str, object], complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        standard_messages([{"role": "user", "content": "Hi"}, message])


TOOLS = {
    "chat": TOOL,
    "responses": {"type": "function", **FUNCTION},
    "anthropic": {
        "name": "weather",
        "description": "Looks it up.",
        "input_schema": SCHEMA,
        "cache_control": {"type": "ephemeral"},
    },
    "anthropic_custom": {"type": "custom", "name": "weather", "description": "Looks it up.", "input_schema": SCHEMA},
    "flat": FUNCTION,
}


@pytest.mark.parametrize("protocol", TOOLS)
def test_tools_of_every_protocol_are_the_same_for_the_template(protocol: str) -> None:
    assert prepare_tools([TOOLS[protocol]]) == [TOOL] == function_tools([TOOLS[protocol]])


def test_tools_that_only_a_provider_can_run_are_left_out() -> None:
    foreign = [
        {"type": "web_search"},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
        {"type": "namespace", "name": "n", "tools": []},
    ]
    free = {"type": "custom", "custom": {"name": "patch", "format": {"type": "text"}}}
    assert function_tools([*foreign, TOOL]) == [TOOL]
    assert [tool["function"] for tool in function_tools([free, {"type": "custom", "name": "patch"}])] == [
        {
            "name": "patch",
            "parameters": {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]},
        }
    ] * 2
