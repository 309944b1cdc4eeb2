"""Fifty schemas on random weights: every answer is valid, with and without drafts, alone and in a batch.

Every schema bounds its texts and lists, and an answer that `max_tokens` cuts would fail here: what is written comes to
its end by itself. Weights are random, so that nothing but the grammar makes it right.
"""

import json
import re
from collections.abc import Iterator

import jsonschema
import mlx.core as mx
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.engine import Engine
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.requests import Request, prepare_request
from mlx_qwen.settings import EngineSettings
from tests.support import checkpoints
from tests.support.json_schemas import COUNT, FIFTY, TEXT, WORD, Schema, listed, record

Loaded = tuple[Model, Processor]
QUESTION = [{"role": "user", "content": "Describe it."}]
# jsonschema's own checks of times need another package; RFC 3339 says what they look like.
FORMATS = jsonschema.FormatChecker(("date", "uuid", "ipv4", "ipv6", "email"))
TIME = r"([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
FORMATS.checks("time")(lambda text: re.fullmatch(TIME, text) is not None)
FORMATS.checks("date-time")(lambda text: re.fullmatch(rf"\d{{4}}-\d\d-\d\dT{TIME}", text) is not None)
FORMATS.checks("duration")(lambda text: re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(\d+[HMS])+)?", text) is not None)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """A small random model with an MTP layer, the bundled tokenizer, and a vocabulary that is padded behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(checkpoints._TEXT, "vocab_size", 672)
        folder = checkpoints.tiny_checkpoint(tmp_path_factory.mktemp("random"), "dense", with_mtp=True)
    model = load_model(folder, ModelConfig.from_directory(folder))
    demo = demo_folder()
    yield model, Processor.from_directory(demo, ModelConfig.from_directory(demo))


def request(loaded: Loaded, index: int, *, mtp: int, **options: object) -> Request:
    chosen = GenerationOptions(  # type: ignore[arg-type]
        **{"max_tokens": 1500, "temperature": 1.0, "top_p": 1.0, "seed": index, "enable_thinking": True, **options},
    )
    return prepare_request(*loaded, QUESTION, chosen, EngineSettings(mtp=mtp, prefix_cache=False))


def finished(loaded: Loaded, requests: list[Request]) -> list[tuple[list[int], str, str | None, str]]:
    """Tokens, content, reasoning and end of answers that are written at the same time."""
    engine = Engine(loaded[0])
    for one in requests:
        engine.submit(one.sequence)
    written = []
    for one in requests:
        tokens = [emission.token for emission in engine.stream(one.sequence)]
        parsed = one.answer.parsed
        assert parsed is not None
        written.append((tokens, parsed.content, parsed.reasoning, parsed.finish_reason))
    return written


def test_every_answer_is_valid_and_the_same_with_drafts_and_in_a_batch(random_model: Loaded) -> None:
    def all_of(mtp: int) -> list[Request]:
        return [
            request(random_model, index, mtp=mtp, schema=schema, thinking_budget=6)
            for index, schema in enumerate(FIFTY.values())
        ]

    assert len(FIFTY) == 50
    together = finished(random_model, all_of(3))
    for (name, schema), (_, content, reasoning, end) in zip(FIFTY.items(), together, strict=True):
        assert end == "stop", name
        jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(content))
        assert reasoning, name
    alone = [finished(random_model, [one])[0] for one in all_of(0)]
    assert [tokens for tokens, *_ in together] == [tokens for tokens, *_ in alone]


def test_random_weights_break_what_is_not_held(random_model: Loaded) -> None:
    written = finished(random_model, [request(random_model, 0, mtp=0, max_tokens=40, enable_thinking=False)])
    with pytest.raises(json.JSONDecodeError):
        json.loads(written[0][1])


PARAMETERS: dict[str, Schema] = {
    "texts": record(path=TEXT, note={"type": "string", "minLength": 2, "maxLength": 5}),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, word=WORD),
    "numbers": record(count=COUNT, share={"type": "number", "minimum": 0, "maximum": 1}),
    "choices": record(unit={"enum": ["C", "F"]}, either={"enum": [1, "two", None, True]}),
    "optional": record(["b"], a=COUNT, b=WORD, c={"type": "boolean"}),
    "nested": record(place=record(x=COUNT, names=listed(WORD)), tags=listed({"enum": ["a", "ü"]})),
    "union": record(
        value={"anyOf": [WORD, {"type": "null"}, listed(COUNT, 1, 2)]}, other={"type": ["integer", "null"]}
    ),
    "references": {
        **record(a={"$ref": "#/$defs/w"}, b={"$ref": "#/$defs/p"}),
        "$defs": {"w": WORD, "p": record(x=COUNT)},
    },
    "recursion": {
        **record(tree={"$ref": "#/$defs/tree"}),
        "$defs": {"tree": record(v=COUNT, inner=listed({"$ref": "#/$defs/tree"}, 0, 1))},
    },
    "put together": {"allOf": [record(["a"], a=COUNT), {"properties": {"b": WORD}, "required": ["b"]}]},
    "formats": record(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    "short names": record(a={"type": "int", "minimum": 1, "maximum": 9}, b={"type": "bool"}),
    "nothing": {"type": "object", "properties": {}},
}


def tool(name: str, parameters: Schema, **more: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def plain(schema: Schema) -> Schema:
    """The schema with the types' own names, for jsonschema."""
    text = json.dumps(schema).replace('"int"', '"integer"').replace('"bool"', '"boolean"')
    # Closed objects side by side in allOf accept nothing; calls are judged by each part.
    return json.loads(text.replace('"additionalProperties": false', '"additionalProperties": true'))  # type: ignore[no-any-return]


def test_arguments_of_calls_fit_their_schemas(random_model: Loaded) -> None:
    def all_of(mtp: int) -> list[Request]:
        return [
            request(
                random_model,
                index,
                mtp=mtp,
                tools=[tool("use_it", schema, strict=True)],
                tool_choice="use_it",
                thinking_budget=4,
                parallel_tool_calls=False,
            )
            for index, schema in enumerate(PARAMETERS.values())
        ]

    drafted = all_of(3)
    together = finished(random_model, drafted)
    for one, (name, schema), (_, content, _, end) in zip(drafted, PARAMETERS.items(), together, strict=True):
        assert (end, content.strip()) == ("tool_calls", ""), name
        assert one.answer.parsed is not None
        (call,) = one.answer.parsed.tool_calls
        assert call.name == "use_it"
        jsonschema.Draft202012Validator(plain(schema), format_checker=FORMATS).validate(call.arguments)
        if "allOf" not in schema:
            assert call.arguments.keys() <= schema["properties"].keys()
    alone = [finished(random_model, [one])[0] for one in all_of(0)]
    assert [tokens for tokens, *_ in together] == [tokens for tokens, *_ in alone]


def test_a_call_that_a_model_begins_itself_is_held_where_the_tool_is_strict(random_model: Loaded) -> None:
    opener = random_model[1].tokenizer.token_to_id("<tool_call>")
    options = {"tools": [tool("use_it", PARAMETERS["numbers"], strict=True)], "parallel_tool_calls": False}

    def begin(_: mx.array, logits: mx.array) -> mx.array:
        return mx.where(mx.arange(logits.shape[-1]) == opener, 30.0, logits)

    one = request(random_model, 1, mtp=0, enable_thinking=False, logits_processors=[begin], **options)
    written = finished(random_model, [one])
    assert written[0][3] == "tool_calls"
    assert one.answer.parsed is not None
    jsonschema.validate(one.answer.parsed.tool_calls[0].arguments, PARAMETERS["numbers"])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (record(a={"type": "array", "uniqueItems": True}), "Tool use_it, a cannot be enforced.*uniqueItems"),
        (record(a={"type": "string", "pattern": "(?=x)"}), "Tool use_it, a: pattern.*look"),
        ({**record(a=COUNT), "minProperties": 1}, "Tool use_it cannot be enforced: minProperties"),
        (record(**{"a>b": COUNT}), "cannot be written in a call"),
    ],
    ids=["uniqueItems", "pattern", "minProperties", "name"],
)
def test_what_of_a_strict_tool_cannot_be_enforced_is_refused_by_name(
    random_model: Loaded, schema: Schema, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        request(random_model, 0, mtp=0, tools=[tool("use_it", schema, strict=True)], tool_choice="required")


def test_a_tool_that_is_not_strict_is_held_to_what_can_be_enforced(random_model: Loaded) -> None:
    schema = record(
        a={**listed(COUNT, 1, 3), "uniqueItems": True}, b={"type": "string", "pattern": "(?=x)", "maxLength": 5}
    )
    one = request(
        random_model, 0, mtp=0, tools=[tool("use_it", schema)], tool_choice="required", parallel_tool_calls=False
    )
    finished(random_model, [one])
    assert one.answer.parsed is not None
    arguments = one.answer.parsed.tool_calls[0].arguments
    assert all(0 <= value <= 99 for value in arguments["a"])  # type: ignore[union-attr, operator]
    assert len(arguments["b"]) <= 5  # type: ignore[arg-type]


PATTERNS = [
    r"[a-z]{3}-\d{4}",
    r"(yes|no)( (and|or) (yes|no)){0,2}",
    r"[äöü]{2,5}",
    r"\{[^{}\n]{0,9}\}",
    r"a.c",
    r"(ab?){2,4}",
    r"a</?tool_call>(x|y)<think>",
]


def test_every_answer_matches_its_regex(random_model: Loaded) -> None:
    held = [request(random_model, i, mtp=2, regex=pattern, thinking_budget=3) for i, pattern in enumerate(PATTERNS)]
    for pattern, (_, content, _, end) in zip(PATTERNS, finished(random_model, held), strict=True):
        assert end == "stop"
        assert re.fullmatch(pattern, content), (pattern, content)
