"""What a request says reaches the model as it was meant, or is refused in the protocol's own words, by its field."""

import json

import httpx
import pytest

from mlx_qwen.server.reading import sealed, unsealed
from tests.server.running import ScriptedBackend, running, words

CHAT, TEXT, RESPONSE, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
HI = [{"role": "user", "content": "Hi"}]
NOTE = {"name": "note", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
GOOD = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "Hi"},
    RESPONSE: {"input": "Hi"},
    MESSAGE: {"messages": HI, "max_tokens": 5},
}
CHAT_TOOLS = [{"type": "function", "function": NOTE}]
CLAUDE_TOOLS = [{"name": "note", "input_schema": NOTE["parameters"]}]


# Protocol, what is added to a good request, and the field that is refused.
REFUSED = [
    *[(path, {"model": 5}, "model") for path in GOOD],
    *[(path, {"stream": "yes"}, "stream") for path in GOOD],
    *[(path, {"temperature": "hot"}, "temperature") for path in GOOD],
    *[(path, {"temperature": -0.1}, "temperature") for path in GOOD],
    *[(path, {"temperature": 2.1}, "temperature") for path in GOOD],
    *[(path, {"top_p": 1.5}, "top_p") for path in GOOD],
    *[(path, {"top_k": -1}, "top_k") for path in GOOD],
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": None}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": ["Hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages"),
    (CHAT, {"max_tokens": 0}, "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "max_completion_tokens"),
    (CHAT, {"n": 0}, "n"),
    (CHAT, {"n": 17}, "n"),
    (CHAT, {"n": True}, "n"),
    (CHAT, {"seed": -1}, "seed"),
    (CHAT, {"seed": 1.5}, "seed"),
    (CHAT, {"stop": [""]}, "stop"),
    (CHAT, {"stop": [5]}, "stop"),
    (CHAT, {"stop": ["x"] * 17}, "stop"),
    (CHAT, {"presence_penalty": 3}, "presence_penalty"),
    (CHAT, {"frequency_penalty": -3}, "frequency_penalty"),
    (CHAT, {"logit_bias": {"hello": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"reasoning_effort": "heroic"}, "reasoning_effort"),
    (CHAT, {"tools": {}}, "tools"),
    (CHAT, {"tools": ["note"]}, "tools[0]"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {"name": "no>te"}}]}, "tools[0].function.name"),
    (CHAT, {"tools": [{"type": "function", "function": {**NOTE, "parameters": []}}]}, "tools[0].function"),
    (CHAT, {"tool_choice": "required"}, "tool_choice"),
    (CHAT, {"tool_choice": "maybe", "tools": CHAT_TOOLS}, "tool_choice"),
    (CHAT, {"tool_choice": {"type": "function", "function": {"name": "x"}}, "tools": CHAT_TOOLS}, "tool_choice"),
    (CHAT, {"stream_options": []}, "stream_options"),
    (CHAT, {"functions": [NOTE]}, "functions"),
    (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
    (CHAT, {"web_search_options": {"a": 1}}, "web_search_options"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": ["one", "two"]}, "prompt"),
    (TEXT, {"prompt": [1, "two"]}, "prompt"),
    (TEXT, {"echo": True}, "echo"),
    (TEXT, {"suffix": "end"}, "suffix"),
    (TEXT, {"best_of": 3}, "best_of"),
    (TEXT, {"logprobs": 6}, "logprobs"),
    (TEXT, {"max_tokens": 0}, "max_tokens"),
    (RESPONSE, {"input": None}, "input"),
    (RESPONSE, {"input": []}, "input"),
    (RESPONSE, {"input": 5}, "input"),
    (RESPONSE, {"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0]"),
    (RESPONSE, {"input": [{"role": "robot", "content": "Hi"}]}, "input[0].role"),
    (RESPONSE, {"max_output_tokens": 0}, "max_output_tokens"),
    (RESPONSE, {"background": True}, "background"),
    (RESPONSE, {"conversation": "conv_1"}, "conversation"),
    (RESPONSE, {"text": {"format": {"type": "xml"}}}, "text.format.type"),
    (RESPONSE, {"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
    (MESSAGE, {"max_tokens": None}, "max_tokens"),
    (MESSAGE, {"max_tokens": 0}, "max_tokens"),
    (MESSAGE, {"messages": []}, "messages"),
    (MESSAGE, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    (MESSAGE, {"system": [{"type": "image"}]}, "system"),
    (MESSAGE, {"temperature": 1.1}, "temperature"),
    (MESSAGE, {"stop_sequences": [5]}, "stop_sequences"),
    (MESSAGE, {"tools": [{"name": ""}]}, "tools[0].name"),
    (MESSAGE, {"tool_choice": {"type": "tool", "name": "x"}, "tools": CLAUDE_TOOLS}, "tool_choice.name"),
    (MESSAGE, {"tool_choice": {"type": "any"}}, "tool_choice"),
    (MESSAGE, {"tool_choice": {"name": "note"}}, "tool_choice.type"),
    (MESSAGE, {"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    (MESSAGE, {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens"),
    (MESSAGE, {"thinking": {"type": "deep"}}, "thinking.type"),
    (MESSAGE, {"output_config": {"effort": "heroic"}}, "output_config.effort"),
    (MESSAGE, {"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
]
# Protocol, what is added, and choices that the model then gets.
UNDERSTOOD = [
    (CHAT, {"max_tokens": 7, "max_completion_tokens": 9}, {"max_tokens": 9}),
    (CHAT, {"max_tokens": 7}, {"max_tokens": 7}),
    (CHAT, {"temperature": None, "stop": None, "n": None, "tools": None}, {}),
    (CHAT, {"stop": "END"}, {"stop": ["END"]}),
    (CHAT, {"stop": []}, {}),
    (CHAT, {"seed": 3, "top_k": 0, "min_p": 0.1}, {"seed": 3, "top_k": 0, "min_p": 0.1}),
    (CHAT, {"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 2}, {"logprobs": 2}),
    (CHAT, {"logprobs": False}, {}),
    (CHAT, {"reasoning_effort": "none"}, {"reasoning_effort": "none"}),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, {"chat_template_kwargs": {"enable_thinking": True}}),
    (CHAT, {"tools": [{"type": "web_search"}]}, {}),
    (CHAT, {"tools": CHAT_TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, {"tools": CHAT_TOOLS}),
    (CHAT, {"tools": CHAT_TOOLS, "tool_choice": "none"}, {"tools": CHAT_TOOLS, "tool_choice": "none"}),
    (CHAT, {"tools": CHAT_TOOLS, "parallel_tool_calls": False}, {"tools": CHAT_TOOLS, "parallel_tool_calls": False}),
    (
        CHAT,
        {"tools": CHAT_TOOLS, "tool_choice": {"type": "function", "function": {"name": "note"}}},
        {"tools": CHAT_TOOLS, "tool_choice": "note"},
    ),
    (
        CHAT,
        {"tools": [{"type": "function", "strict": True, "x": 1, "function": {**NOTE, "strict": True, "y": 2}}]},
        {"tools": [{"type": "function", "function": {**NOTE, "strict": True}}]},
    ),
    (CHAT, {"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
    (CHAT, {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": True, "made_up": [1]}, {}),
    (TEXT, {"logprobs": 2}, {"logprobs": 2}),
    (RESPONSE, {"max_output_tokens": 9, "reasoning": {"effort": "low"}}, {"max_tokens": 9, "reasoning_effort": "low"}),
    (RESPONSE, {"tools": [{"type": "function", **NOTE}, {"type": "namespace"}]}, {"tools": CHAT_TOOLS}),
    (
        RESPONSE,
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            }
        },
    ),
    (RESPONSE, {"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
    (MESSAGE, {"stop_sequences": ["END"], "metadata": {"user_id": "x"}}, {"max_tokens": 5, "stop": ["END"]}),
    (MESSAGE, {"thinking": {"type": "adaptive"}}, {"max_tokens": 5}),
    (MESSAGE, {"thinking": {"type": "disabled"}}, {"max_tokens": 5, "enable_thinking": False}),
    (
        MESSAGE,
        {"thinking": {"type": "enabled", "budget_tokens": 4}},
        {"max_tokens": 5, "enable_thinking": True, "thinking_budget": 4},
    ),
    (MESSAGE, {"output_config": {"effort": "max"}}, {"max_tokens": 5, "reasoning_effort": "max"}),
    (
        MESSAGE,
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {"max_tokens": 5, "schema": {"type": "object"}},
    ),
    (
        MESSAGE,
        {"tools": [*CLAUDE_TOOLS, {"type": "bash_20250124", "name": "bash"}], "tool_choice": {"type": "any"}},
        {"max_tokens": 5, "tools": CHAT_TOOLS, "tool_choice": "required"},
    ),
    (
        MESSAGE,
        {"tools": CLAUDE_TOOLS, "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"max_tokens": 5, "tools": CHAT_TOOLS, "parallel_tool_calls": False},
    ),
    (MESSAGE, {"context_management": {"edits": []}, "betas": ["x"]}, {"max_tokens": 5}),
]


@pytest.fixture(scope="module")
def backend():
    return ScriptedBackend(lambda ask, index: words("Well."))


@pytest.fixture(scope="module")
def client(backend):
    with running(backend) as address, httpx.Client(base_url=address, timeout=20) as client:
        yield client


@pytest.mark.parametrize(("path", "added", "field"), REFUSED, ids=lambda one: json.dumps(one)[:60])
def test_what_cannot_be_meant_is_refused_by_its_field(client, backend, path, added, field):
    before = len(backend.asked)
    for stream in (False, True):
        answer = client.post(path, json={"stream": stream, **GOOD[path], **added})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        if path == MESSAGE:
            assert answer.json()["type"] == "error"
            assert error["message"].startswith(f"{field}: ")
        else:
            assert error["param"] == field
    assert len(backend.asked) == before


@pytest.mark.parametrize(("path", "added", "choices"), UNDERSTOOD, ids=lambda one: json.dumps(one)[:60])
def test_choices_reach_the_model(client, backend, path, added, choices):
    assert client.post(path, json={**GOOD[path], **added}).status_code == 200
    assert dict(backend.asked[-1].ask.choices) == choices


def prompt_of(client, backend, path, body):
    answer = client.post(path, json={**GOOD[path], **body})
    assert answer.status_code == 200, answer.text
    return list(backend.asked[-1].ask.prompt)


def test_messages_of_every_protocol_say_the_same(client, backend):
    call = {"name": "note", "arguments": {"text": "a"}}
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Note a."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "noted"},
    ]
    text = json.dumps(call["arguments"])
    chat = [*plain[:2], {**plain[2], "tool_calls": [{"id": "c1", "function": {**call, "arguments": text}}]}, plain[3]]
    claude = [
        {"role": "user", "content": [{"type": "text", "text": "Note a.", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "tool_use", "id": "c1", "name": "note", "input": {"text": "a"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "noted"}]},
    ]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Note a."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed("Hm.")},
        {"type": "function_call", "call_id": "c1", "name": "note", "arguments": text},
        {"type": "function_call_output", "call_id": "c1", "output": "noted"},
    ]
    said = [
        prompt_of(client, backend, CHAT, {"messages": chat}),
        prompt_of(client, backend, MESSAGE, {"system": "Be brief.", "messages": claude}),
        prompt_of(client, backend, RESPONSE, {"instructions": "Be brief.", "input": items}),
    ]
    assert said == [plain] * 3


def test_a_billing_line_that_differs_from_session_to_session_is_left_out(client, backend):
    blocks = [{"type": "text", "text": f"x-anthropic-billing-header: cch={n};\nYou are."} for n in (1, 2)]
    said = [prompt_of(client, backend, MESSAGE, {"system": [block]}) for block in blocks]
    assert said[0] == said[1]
    assert said[0][0] == {"role": "system", "content": "You are."}
    assert "billing line left out" in backend.asked[-1].ask.notes


def test_a_later_request_goes_on_with_a_stored_response(client, backend):
    first = client.post(RESPONSE, json={"input": "Hi", "instructions": "Be brief."}).json()
    said = prompt_of(client, backend, RESPONSE, {"input": "And?", "previous_response_id": first["id"]})
    assert said == [*HI, {"role": "assistant", "content": "Well."}, {"role": "user", "content": "And?"}]
    unstored = client.post(RESPONSE, json={"input": "Hi", "store": False}).json()
    refused = client.post(RESPONSE, json={"input": "And?", "previous_response_id": unstored["id"]})
    assert refused.status_code == 404
    assert refused.json()["error"]["code"] == "previous_response_not_found"


def test_packed_reasoning_comes_back_as_it_was():
    assert unsealed(sealed("Hm, 世界.")) == "Hm, 世界."
    for foreign in (None, "", "gAAAAA", "mlxqwen1.####", "mlxqwen1.AAAA"):
        assert unsealed(foreign) == ""


def test_unknown_models_are_not_found(client):
    for path, good in GOOD.items():
        answer = client.post(path, json={**good, "model": "gpt-9"})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == ("not_found_error" if path == MESSAGE else "invalid_request_error")


def test_half_a_surrogate_pair_is_mended(client, backend):
    answer = client.post(
        CHAT, content=b'{"messages": [{"role": "user", "content": "cut \\ud83d here \\ud83d\\ude00"}]}'
    )
    assert answer.status_code == 200
    assert backend.asked[-1].ask.prompt[0]["content"] == "cut \N{REPLACEMENT CHARACTER} here 😀"
