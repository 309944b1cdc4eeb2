"""Clients that Python programs use, each against the bundled model over HTTP."""

import asyncio
import json
import os
import subprocess
import sys

import anthropic
import openai
import pytest
from anthropic import beta_tool
from pydantic import BaseModel

MODEL = "mlx-qwen-demo"
HELLO = "Hello! I am a tiny demo model. I know sums, lists, pictures with shapes, and tools."
HI = [{"role": "user", "content": "Hello"}]
PARIS = {"role": "user", "content": "How is the weather in Paris?"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"name": "get_weather", "description": "The weather in a city", "parameters": SCHEMA}
SUNNY = '{"sky": "sunny", "degrees": 21}'


class Sum(BaseModel):
    """What a structured answer holds."""

    left: int
    right: int


def test_openais_client_runs_a_tool_loop(client):
    tools = [{"type": "function", "function": WEATHER}]
    first = client.chat.completions.create(model=MODEL, messages=[PARIS], tools=tools).choices[0]
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    loop = [PARIS, first.message, {"role": "tool", "tool_call_id": call.id, "content": SUNNY}]
    last = client.chat.completions.create(model=MODEL, messages=loop, tools=tools)
    assert "21" in last.choices[0].message.content
    assert last.usage.prompt_tokens_details.cached_tokens > 0.8 * last.usage.prompt_tokens - 40


def test_openais_client_runs_a_tool_loop_over_responses(client):
    tools = [{"type": "function", "strict": False, **WEATHER}]
    first = client.responses.create(model=MODEL, input=[PARIS], tools=tools)
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": SUNNY}
    kept = client.responses.create(model=MODEL, input=[result], tools=tools, previous_response_id=first.id)
    sent = client.responses.create(model=MODEL, input=[PARIS, *first.output, result], tools=tools)
    assert "21" in kept.output_text
    assert kept.output_text == sent.output_text


def test_openais_asynchronous_client_streams_several_at_once(url):
    async def ask(client):
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client) for _ in range(4)))

    assert asyncio.run(together()) == [HELLO] * 4


def test_openais_legacy_completions_go_on_with_text(client):
    whole = client.completions.create(model=MODEL, prompt="1 2 3 4", max_tokens=8)
    parts = client.completions.create(model=MODEL, prompt="1 2 3 4", max_tokens=8, stream=True)
    assert whole.choices[0].text == "".join(part.choices[0].text for part in parts)
    assert whole.usage.completion_tokens <= 8


def test_reasoning_comes_apart_from_the_answer(client, claude):
    asked = [{"role": "user", "content": "37+58"}]
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    message = client.chat.completions.create(model=MODEL, messages=asked, extra_body=thinking).choices[0].message
    assert message.reasoning_content
    assert "think>" not in message.content + message.reasoning_content
    assert message.content == message.content.strip()
    blocks = claude.messages.create(
        model=MODEL, max_tokens=300, messages=asked, thinking={"type": "enabled", "budget_tokens": 200}
    ).content
    assert [block.type for block in blocks] == ["thinking", "text"]
    assert (blocks[0].thinking, blocks[1].text) == (message.reasoning_content, message.content)
    assert blocks[0].signature


def test_openais_helper_parses_a_structured_answer(client):
    pytest.importorskip("llguidance")
    parsed = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Sum, max_tokens=100)
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    made = client.responses.parse(model=MODEL, input=HI, text_format=Sum, max_output_tokens=100)
    assert isinstance(made.output_parsed, Sum)


def test_anthropics_helper_parses_a_structured_answer(claude):
    pytest.importorskip("llguidance")
    parsed = claude.messages.parse(model=MODEL, messages=HI, output_format=Sum, max_tokens=100)
    assert isinstance(parsed.parsed_output, Sum)


@beta_tool
def get_weather(city: str) -> str:
    """The weather in a city"""
    assert city == "Paris"
    return SUNNY


def test_anthropics_tool_runner_runs_a_loop(claude):
    runner = claude.beta.messages.tool_runner(model=MODEL, max_tokens=200, tools=[get_weather], messages=[PARIS])
    assert "21" in runner.until_done().content[0].text


def test_anthropics_asynchronous_client_streams(url):
    async def ask():
        asked = {"model": MODEL, "max_tokens": 100, "messages": HI}
        async with (
            anthropic.AsyncAnthropic(base_url=url, api_key="none") as client,
            client.messages.stream(**asked) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == HELLO


def test_models_and_tokens_are_told(client, claude):
    assert [model.id for model in client.models.list()] == [MODEL] == [model.id for model in claude.models.list()]
    assert client.models.retrieve(MODEL).id == claude.models.retrieve(MODEL).id == MODEL
    counted = claude.messages.count_tokens(model=MODEL, messages=HI).input_tokens
    made = claude.messages.create(model=MODEL, max_tokens=1, messages=HI).usage
    assert counted == made.input_tokens + made.cache_read_input_tokens


def test_litellm_asks_in_both_protocols(url):
    asked = {"messages": HI, "api_key": "none", "max_tokens": 100}
    program = f"""
import json, litellm
whole = litellm.completion(model="openai/{MODEL}", api_base="{url}/v1", **{asked!r})
parts = litellm.completion(model="anthropic/{MODEL}", api_base="{url}", stream=True, **{asked!r})
summed = "".join(part.choices[0].delta.content or "" for part in parts)
print(json.dumps([whole.choices[0].message.content, summed]))
"""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [HELLO, HELLO]


def test_llm_asks_a_model_of_its_configuration(url, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: {MODEL}\n  api_base: {url}/v1\n  supports_tools: true\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    command = [sys.executable, "-m", "llm", "-m", "local", "Hello"]
    for flags in ([], ["--no-stream"]):
        ended = subprocess.run(
            [*command, *flags], capture_output=True, text=True, env=environment, timeout=120, check=False
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        assert ended.stdout.strip() == HELLO


@pytest.mark.parametrize("protocol", ["chat", "responses", "messages"])
def test_an_agent_of_pydantic_ai_calls_its_tool(url, protocol):
    from pydantic_ai import Agent
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.anthropic import AnthropicProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    if protocol == "messages":
        model = AnthropicModel(
            MODEL, provider=AnthropicProvider(anthropic_client=anthropic.AsyncAnthropic(base_url=url, api_key="none"))
        )
    else:
        kind = OpenAIChatModel if protocol == "chat" else OpenAIResponsesModel
        model = kind(MODEL, provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    agent = Agent(model)
    asked = []

    @agent.tool_plain(name="get_weather")
    def weather(city: str) -> str:
        """The weather in a city"""
        asked.append(city)
        return SUNNY

    assert "21" in agent.run_sync(PARIS["content"]).output
    assert asked == ["Paris"]
