"""Every event that a stream sends is one that the SDK's types know, and their sum is the answer that comes whole."""

import json

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.server.work import Likelihood, Piece
from tests.server.running import ScriptedBackend, calls, running, words

LIKELY = Likelihood("Hé", "Hé".encode(), -0.5, (Likelihood("Hé", "Hé".encode(), -0.5), Likelihood("Ho", b"Ho", -1.5)))
TOOL = {"type": "object", "properties": {"text": {"type": "string"}}}
SCRIPTS = {
    "words": words("Grüße", ", ", "世", "界 🙂", "\n"),
    "nothing": words(),
    "cut short": words("one ", "two", finish="length"),
    "a stop string": words("one ", stopped_by="STOP"),
    "reasoning": [
        Piece(AnswerDelta(reasoning="Let me "), 1, 1),
        Piece(AnswerDelta(reasoning="see."), 2, 2),
        *words("4"),
    ],
    "reasoning alone": [Piece(AnswerDelta(reasoning="Let me "), 1, 1), Piece(AnswerDelta(), 2, 2, finish="length")],
    "a call": calls(("note", ['{"text": "a', 'b"}'])),
    "a call without arguments": calls(("note", ["{}"])),
    "two calls": calls(("note", ['{"text": "a"}']), ("note", ['{"text"', ': "b"}'])),
    "words and a call": [*words("I note it.")[:-1], *calls(("note", ['{"text": "a"}']))],
    "a call that is cut short": calls(("note", ['{"text": "a", "more": "b']), finish="length"),
    "reasoning and a call": [Piece(AnswerDelta(reasoning="Hm."), 1, 1), *calls(("note", ['{"text": "a"}']))],
    "several parts in a piece": [Piece(AnswerDelta(content="so", reasoning="Hm."), 3, 2, 5), *words(" be it")],
    "likelihoods": [Piece(AnswerDelta(content="Hé"), 1, likelihoods=(LIKELY,)), *words("!")],
}
QUESTION = [{"role": "user", "content": "Well?"}]
ASKED = {
    "/v1/chat/completions": {
        "messages": QUESTION,
        "tools": [{"type": "function", "function": {"name": "note", "parameters": TOOL}}],
        "stream_options": {"include_usage": True},
        "logprobs": True,
    },
    "/v1/completions": {"prompt": "Well", "stream_options": {"include_usage": True}},
    "/v1/responses": {"input": QUESTION, "tools": [{"type": "function", "name": "note", "parameters": TOOL}]},
    "/v1/messages": {"messages": QUESTION, "max_tokens": 9, "tools": [{"name": "note", "input_schema": TOOL}]},
}
EVENTS = {
    "/v1/chat/completions": TypeAdapter(ChatCompletionChunk),
    "/v1/completions": TypeAdapter(Completion),
    "/v1/responses": TypeAdapter(ResponseStreamEvent),
    "/v1/messages": TypeAdapter(RawMessageStreamEvent),
}
WHOLE = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/responses": Response,
    "/v1/messages": Message,
}


@pytest.fixture(scope="module")
def backend():
    return ScriptedBackend(lambda ask, index: SCRIPTS["words"])


@pytest.fixture(scope="module")
def url(backend):
    with running(backend) as address:
        yield address


def events(url, path, body):
    """The events of a stream: (name, data)."""
    answer = httpx.post(url + path, json={**body, "stream": True}, timeout=20)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((lines.get("event"), lines["data"]))
    return found


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_event_is_one_that_the_sdk_knows(url, backend, path, script):
    backend.script = lambda ask, index: SCRIPTS[script]
    found = events(url, path, ASKED[path])
    if "completions" in path:
        assert found.pop() == (None, "[DONE]")
    for name, data in found:
        assert name is None or name == json.loads(data)["type"]
        EVENTS[path].validate_json(data)
    if path == "/v1/responses":
        assert [json.loads(data)["sequence_number"] for _, data in found] == list(range(len(found)))
    WHOLE[path].model_validate_json(httpx.post(url + path, json=ASKED[path]).text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_chat_stream_sums_up_to_the_whole_completion(url, backend, script):
    backend.script = lambda ask, index: SCRIPTS[script]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked = {**ASKED["/v1/chat/completions"], "model": "scripted"}
    raw = client.chat.completions.with_raw_response
    whole = client.chat.completions.create(**{**asked, "stream_options": openai.NOT_GIVEN})
    summed = openai.lib.streaming.chat.ChatCompletionStreamState()
    for chunk in client.chat.completions.create(**asked, stream=True):
        summed.handle_chunk(chunk)
    assert raw is not None
    one, other = (_chat(completion) for completion in (whole, summed.current_completion_snapshot))
    assert one == other


def _chat(completion):
    choice = completion.choices[0]
    return {
        "content": choice.message.content or None,
        "reasoning": getattr(choice.message, "reasoning_content", None),
        "calls": [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()],
        "finish": choice.finish_reason,
        "logprobs": choice.logprobs.content or None if choice.logprobs else None,
        "usage": completion.usage.model_dump(),
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_response_stream_sums_up_to_the_whole_response(url, backend, script):
    backend.script = lambda ask, index: SCRIPTS[script]
    whole = httpx.post(f"{url}/v1/responses", json=ASKED["/v1/responses"]).json()
    made = [json.loads(data) for _, data in events(url, "/v1/responses", ASKED["/v1/responses"])]
    last = made[-1]["response"]
    assert made[0]["type"] == "response.created"
    assert made[-1]["type"] == f"response.{whole['status']}"
    assert whole["status"] == ("incomplete" if "cut" in script or "alone" in script else "completed")
    done = [event["item"] for event in made if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    assert [_item(item) for item in done] == [_item(item) for item in whole["output"]]
    for item in done:
        deltas = [one["delta"] for one in made if one["type"].endswith(".delta") and one["item_id"] == item["id"]]
        parts = item.get("content") or [{"text": item.get("arguments")}]
        assert "".join(deltas) == "".join(part["text"] for part in parts)
    assert last["usage"] == whole["usage"]


def _item(item):
    """An item without its identity."""
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_message_stream_sums_up_to_the_whole_message(url, backend, script):
    backend.script = lambda ask, index: SCRIPTS[script]
    client = anthropic.Anthropic(base_url=url, api_key="none")
    asked = {**ASKED["/v1/messages"], "model": "scripted"}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        summed = stream.get_final_message()
    drop = {"id": True, "content": {"__all__": {"id"}}}
    assert summed.model_dump(exclude=drop) == whole.model_dump(exclude=drop)
    expected = {"a stop string": "stop_sequence", "cut short": "max_tokens", "a call": "tool_use", "words": "end_turn"}
    assert script not in expected or whole.stop_reason == expected[script]


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_to_one_request_are_told_apart(url, backend, stream):
    backend.script = lambda ask, index: words(f"answer {index}")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    made = client.chat.completions.create(model="scripted", messages=QUESTION, n=3, stream=stream)
    texts = ["", "", ""]
    for part in made if stream else [made]:
        for choice in part.choices:
            texts[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert texts == ["answer 0", "answer 1", "answer 2"]
    assert backend.asked[-1].begun == [0, 1, 2]


@pytest.mark.parametrize("path", ASKED)
def test_an_error_in_the_middle_of_a_stream_is_told_in_the_protocols_form(url, backend, path):
    backend.script = lambda ask, index: [*words("one ")[:-1], RuntimeError("the device is lost")]
    plain = httpx.post(url + path, json=ASKED[path])
    assert plain.status_code == 500
    assert "device" not in plain.text
    name, data = events(url, path, ASKED[path])[-1]
    told = json.loads(data)
    if path == "/v1/responses":
        assert told["response"]["status"] == "failed"
        assert told["response"]["error"]["code"] == "server_error"
    else:
        assert told["error"]["type"] == ("api_error" if "messages" in path else "server_error")
        assert name == ("error" if "messages" in path else None)
