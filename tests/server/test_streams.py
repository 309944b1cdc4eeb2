"""A stream summed by the SDK's own helpers is the answer that comes whole."""

import anthropic
import openai
import pytest

HELLO = "Hello! I am a tiny demo model. I know sums, lists, pictures with shapes, and tools."
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
QUESTIONS = {"words": ("Hello", HELLO), "a call": ("How is the weather in Paris?", None)}


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_chat_stream_sums_up_to_the_whole_completion(client, kind):
    question, answer = QUESTIONS[kind]
    asked = {"model": "mlx-qwen-demo", "messages": [{"role": "user", "content": question}]}
    asked["tools"] = [{"type": "function", "function": WEATHER}] if answer is None else openai.NOT_GIVEN
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        summed = stream.get_final_completion().choices[0]
    assert summed.finish_reason == whole.finish_reason == ("stop" if answer else "tool_calls")
    assert (summed.message.content or None) == whole.message.content == answer
    mine, theirs = (
        [(c.function.name, c.function.arguments) for c in one.message.tool_calls or ()] for one in (whole, summed)
    )
    assert mine == theirs == ([] if answer else [("get_weather", '{"city": "Paris"}')])


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_response_stream_sums_up_to_the_whole_response(client, kind):
    question, answer = QUESTIONS[kind]
    tools = [{"type": "function", "strict": False, **WEATHER}] if answer is None else openai.NOT_GIVEN
    whole = client.responses.create(model="mlx-qwen-demo", input=question, tools=tools)
    with client.responses.stream(model="mlx-qwen-demo", input=question, tools=tools) as stream:
        summed = stream.get_final_response()
    assert summed.output_text == whole.output_text == (answer or "")
    assert summed.status == whole.status == "completed"
    mine, theirs = ([(c.name, c.arguments) for c in one.output if c.type == "function_call"] for one in (whole, summed))
    assert mine == theirs == ([] if answer else [("get_weather", '{"city": "Paris"}')])


@pytest.mark.parametrize("kind", QUESTIONS)
def test_a_message_stream_sums_up_to_the_whole_message(claude, kind):
    question, answer = QUESTIONS[kind]
    described = {"name": WEATHER["name"], "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}
    asked = {"model": "mlx-qwen-demo", "max_tokens": 200, "messages": [{"role": "user", "content": question}]}
    asked["tools"] = anthropic.NOT_GIVEN if answer else [described]
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        summed = stream.get_final_message()
    drop = {"id": True, "usage": True, "content": {"__all__": {"id"}}}
    assert summed.model_dump(exclude=drop) == whole.model_dump(exclude=drop)
    assert whole.stop_reason == ("end_turn" if answer else "tool_use")
    assert answer is None or whole.content[0].text == answer
    assert answer or whole.content[0].input == {"city": "Paris"}


def test_reasoning_that_is_streamed_is_the_reasoning_that_comes_whole(client, claude):
    asked = {"model": "mlx-qwen-demo", "messages": [{"role": "user", "content": "37+58"}]}
    thinking = {"extra_body": {"enable_thinking": True}}
    whole = client.chat.completions.create(**asked, **thinking).choices[0].message
    deltas = [part.choices[0].delta for part in client.chat.completions.create(**asked, **thinking, stream=True)]
    reasoning = "".join(getattr(one, "reasoning_content", None) or "" for one in deltas)
    content = "".join(one.content or "" for one in deltas)
    assert (reasoning, content) == (whole.reasoning_content, whole.content)
    assert reasoning == reasoning.strip() != "" != content == content.strip()

    effort = {"model": "mlx-qwen-demo", "input": "37+58", "reasoning": {"effort": "high"}}
    with client.responses.stream(**effort) as stream:
        summed = [(event.type, event.delta) for event in stream if event.type.endswith("_text.delta")]
    parts = ["".join(delta for kind, delta in summed if name in kind) for name in ("reasoning", "output")]
    assert parts == [reasoning, content]

    budget = {**asked, "max_tokens": 300, "thinking": {"type": "enabled", "budget_tokens": 200}}
    with claude.messages.stream(**budget) as stream:
        thought, text = stream.get_final_message().content
    assert (thought.thinking, text.text) == (reasoning, content)
