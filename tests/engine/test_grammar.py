"""Answers are held to a schema, a regex, a grammar or calls of tools, and reasoning before them stays free."""

import json
import re
import sys
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import jsonschema
import mlx.core as mx
import pytest
from pydantic import BaseModel, Field

import mlx_qwen
from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.answer.typed_schemas import schema_of
from mlx_qwen.errors import PromptError
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate

Loaded = tuple[Model, Processor]
QUESTION = [{"role": "user", "content": "Is it warm in Tokyo?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def demo() -> Loaded:
    """The bundled model in fp32, in which passes over one token and over several round alike."""
    return mlx_qwen.load(dtype=mx.float32)


def answer(demo: Loaded, prompt: object = QUESTION, **options: object) -> list[GenerationResponse]:
    model, processor = demo
    options = {"temperature": 0, "max_tokens": 300, "enable_thinking": False, **options}
    return list(mlx_qwen.stream_generate(model, processor, prompt, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("mtp", [0, 3, "auto"])
def test_an_answer_is_json_that_the_schema_accepts(demo: Loaded, mtp: object, thinking: bool) -> None:
    last = answer(demo, schema=PERSON, mtp=mtp, enable_thinking=thinking)[-1]
    assert last.finish_reason == "stop"
    jsonschema.validate(json.loads(last.content), PERSON)
    assert bool(last.reasoning) is thinking


@pytest.mark.parametrize(
    "options", [{"schema": PERSON}, {"regex": "[a-z]{3}(, [a-z]{2,5}){4}"}], ids=["schema", "regex"]
)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_drafts_change_no_token_of_it(demo: Loaded, options: dict[str, object], temperature: float) -> None:
    options = {**options, "temperature": temperature, "seed": 3, "enable_thinking": True}
    plain, *drafted = (answer(demo, mtp=depth, **options) for depth in (0, 1, 3, 7))
    for each in drafted:
        assert [r.token for r in each] == [r.token for r in plain]
        assert any(r.from_draft for r in each)


def test_rows_of_a_batch_are_held_as_they_are_alone(demo: Loaded) -> None:
    model, processor = demo
    prompts = [[{"role": "user", "content": text}] for text in ("Hello", "What is 3+4?", "Name a color.")]
    options = {"schema": PERSON, "temperature": 0, "max_tokens": 300, "enable_thinking": True}
    together = mlx_qwen.batch_generate(model, processor, prompts, **options)  # type: ignore[arg-type]
    assert together == [mlx_qwen.generate(model, processor, prompt, **options) for prompt in prompts]  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", [r"[a-z]{3}-\d{4}", "(yes|no)( and (yes|no)){2}", '[äöü]{2}/"x"', "a.c"])
def test_an_answer_matches_the_regex_as_a_whole(demo: Loaded, pattern: str) -> None:
    last = answer(demo, regex=pattern)[-1]
    assert last.finish_reason == "stop"
    assert re.fullmatch(pattern, last.content)


def test_an_answer_is_what_the_grammar_accepts(demo: Loaded) -> None:
    sums = 'start: number ("+" number)~1..2 "=" number\nnumber: /[1-9][0-9]{0,2}/'
    last = answer(demo, grammar=sums)[-1]
    assert last.finish_reason == "stop"
    assert re.fullmatch(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,2}=[1-9]\d{0,2}", last.content)


def test_reasoning_leaves_half_of_the_tokens_to_an_answer_that_is_held(demo: Loaded) -> None:
    rambling = [{"role": "user", "content": "Look at nothing."}]
    responses = answer(demo, rambling, regex="[ab]{10}", enable_thinking=True, max_tokens=40)
    assert re.fullmatch("[ab]{10}", responses[-1].content)
    assert responses[-1].finish_reason == "stop"


@pytest.mark.parametrize("budget", [0, 1, 50])
def test_a_budget_is_kept_and_the_held_answer_follows(demo: Loaded, budget: int) -> None:
    responses = answer(demo, schema=PERSON, enable_thinking=True, thinking_budget=budget)
    closed = [r.token for r in responses].index(demo[1].thinking[1])
    assert closed <= budget + 1
    jsonschema.validate(json.loads(responses[-1].content), PERSON)


@pytest.mark.parametrize(
    "wanted",
    [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}],
    ids=["json_object", "json_schema"],
)
def test_openais_response_format_is_kept(demo: Loaded, wanted: dict[str, object]) -> None:
    held = answer(demo, response_format=wanted, max_tokens=600, logits_processors=None)[-1]
    if held.finish_reason == "stop":
        assert isinstance(json.loads(held.content), dict)
    else:
        assert held.finish_reason == "length"
        assert held.content.startswith("{")
    free = answer(demo, response_format={"type": "text"}, max_tokens=5)
    assert [r.token for r in free] == [r.token for r in answer(demo, max_tokens=5)]


class Model1(BaseModel):
    city: str = Field(max_length=10)
    kind: Literal["big", "small"]


@dataclass
class Place:
    kind: Literal["big", "small"]
    warm: bool
    near: "list[Place] | None" = None


class Pair(TypedDict):
    left: Literal[1, 2]
    right: NotRequired[tuple[Literal["x"], Literal["y"]]]


@pytest.mark.parametrize("cls", [Model1, Place, Pair], ids=lambda cls: cls.__name__)
def test_a_python_type_is_a_schema(demo: Loaded, cls: type) -> None:
    schema = schema_of(cls)
    jsonschema.Draft202012Validator.check_schema(schema)
    last = answer(demo, schema=cls)[-1]
    assert last.finish_reason == "stop"
    jsonschema.validate(json.loads(last.content), schema)


def test_schemas_of_types_say_what_they_hold() -> None:
    assert schema_of(Pair)["$defs"]["Pair"] == {
        "type": "object",
        "properties": {
            "left": {"enum": [1, 2]},
            "right": {
                "type": "array",
                "prefixItems": [{"enum": ["x"]}, {"enum": ["y"]}],
                "items": False,
                "minItems": 2,
            },
        },
        "required": ["left"],
        "additionalProperties": False,
    }
    assert schema_of(Place)["$defs"]["Place"]["required"] == ["kind", "warm"]
    with pytest.raises(PromptError, match="complex has no JSON schema"):
        schema_of(complex)


@pytest.mark.parametrize("mtp", [0, 3])
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", "get_weather", {"type": "function", "function": {"name": "get_weather"}}], ids=str
)
def test_a_call_that_is_asked_for_comes_and_fits_its_schema(
    demo: Loaded, choice: object, thinking: bool, mtp: int
) -> None:
    tools = [WEATHER, CLOCK]
    last = answer(demo, tools=tools, tool_choice=choice, enable_thinking=thinking, mtp=mtp)[-1]
    assert last.finish_reason == "tool_calls"
    assert last.content.strip() == ""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in last.tool_calls:
        jsonschema.validate(call.arguments, schemas[call.name])
    if choice != "required":
        assert {call.name for call in last.tool_calls} == {"get_weather"}


def test_no_call_is_begun_where_none_is_wanted(demo: Loaded) -> None:
    processor = demo[1]
    question = [{"role": "user", "content": "What is the weather in Tokyo?"}]
    assert answer(demo, question, tools=[WEATHER])[-1].tool_calls
    responses = answer(demo, question, tools=[WEATHER], tool_choice="none")
    assert responses[-1].tool_calls == ()
    assert processor.tokenizer.token_to_id("<tool_call>") not in [r.token for r in responses]


def test_one_call_is_the_most_where_they_may_not_be_parallel(demo: Loaded) -> None:
    opener = demo[1].tokenizer.token_to_id("<tool_call>")
    options = {"tools": [WEATHER, CLOCK], "tool_choice": "required"}
    responses = answer(demo, parallel_tool_calls=False, **options)
    assert [r.token for r in responses].count(opener) == len(responses[-1].tool_calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {"not": {"type": "string"}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"$ref": "#/$defs/missing"}}, "missing"),
        ({"schema": {"enum": []}}, "enum|anyOf"),
        ({"schema": 5}, "expected a JSON schema"),
        ({"response_format": {"type": "yaml"}}, "json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}, "strict": True}}}, "not"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "start: A\nA: /a/ & /b/"}, "accepts no answer"),
        ({"regex": "a", "schema": PERSON}, "schema and regex both"),
        ({"tool_choice": "required"}, "were given: none"),
        ({"tool_choice": "get_tim", "tools": [WEATHER, CLOCK]}, "get_weather, get_time"),
        ({"tool_choice": {"type": "function"}, "tools": [CLOCK]}, "expected a name"),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name_before_anything_is_computed(
    demo: Loaded, options: dict[str, object], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        mlx_qwen.stream_generate(*demo, QUESTION, **options)  # type: ignore[arg-type]


def test_without_the_library_the_extra_is_named(demo: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PromptError, match=r"pip install 'mlx-qwen\[grammar\]'"):
        mlx_qwen.stream_generate(*demo, QUESTION, schema=PERSON)


@pytest.mark.parametrize("question", ["What is the weather in Tokyo?", "What is 3+4?"])
def test_with_tools_and_a_schema_the_answer_is_a_call_or_json(demo: Loaded, question: str) -> None:
    asked = [{"role": "user", "content": question}]
    last = answer(demo, asked, tools=[WEATHER], schema=PERSON, parallel_tool_calls=False)[-1]
    if last.tool_calls:
        jsonschema.validate(last.tool_calls[0].arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
        assert last.content.strip() == ""
    else:
        jsonschema.validate(json.loads(last.content), PERSON)
    assert last.finish_reason in ("stop", "tool_calls")


def test_calls_are_written_in_json_where_the_template_shows_them_so(demo: Loaded) -> None:
    model, processor = demo
    shown = (processor.chat_template or "").replace("<function=name>", "NAME").replace("<function=", "[")
    as_json = Processor(
        processor.tokenizer, template=ChatTemplate({"default": shown}), end_token_ids=processor.end_token_ids
    )
    options = {"tools": [WEATHER, CLOCK], "tool_choice": "get_weather", "parallel_tool_calls": False}
    last = answer((model, as_json), **options)[-1]
    assert last.finish_reason == "tool_calls"
    assert '{"name": "get_weather", "arguments": ' in "".join(r.text for r in answer((model, as_json), **options))
    jsonschema.validate(last.tool_calls[0].arguments, WEATHER["function"]["parameters"])  # type: ignore[index]
