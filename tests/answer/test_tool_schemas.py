"""Values take the types of their schemas: whenever some reading of the text validates, what arrives validates."""

import ast
import contextlib
import json

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_qwen.answer.schemas import check_schema
from mlx_qwen.answer.tool_values import typed_value
from mlx_qwen.answer.validation import accepts
from tests.answer.transcripts import call, parameter, read

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-6, 6)
    | st.sampled_from([0.5, 5.0, -2.0])
    | st.sampled_from(["", "a", "5"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
    max_leaves=6,
)
TYPES = st.sampled_from(["null", "boolean", "integer", "number", "string", "object", "array"])


def keywords(inner: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    named = st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2)
    some = st.lists(inner, min_size=1, max_size=2)
    number = st.integers(0, 4)
    parts: dict[str, st.SearchStrategy[object]] = {
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        "enum": st.lists(JSON, min_size=1, max_size=3),
        "const": JSON,
        "allOf": some,
        "anyOf": some,
        "oneOf": some,
        "not": inner,
        "if": inner,
        "then": inner,
        "else": inner,
        "properties": named,
        "additionalProperties": st.booleans() | inner,
        "patternProperties": named,
        "propertyNames": inner,
        "required": st.lists(st.sampled_from(["a", "b"]), max_size=2, unique=True),
        "dependentRequired": st.just({"a": ["b"]}),
        "items": inner,
        "prefixItems": some,
        "contains": inner,
        "maxContains": number,
        "uniqueItems": st.booleans(),
        "minItems": number,
        "maxProperties": number,
        "minimum": number,
        "exclusiveMaximum": number,
        "multipleOf": st.sampled_from([1, 2, 0.5]),
        "minLength": number,
        "pattern": st.sampled_from(["^a", "5$"]),
        "$ref": st.sampled_from(["#/$defs/one", "#/definitions/two"]),
    }
    names = st.lists(st.sampled_from(sorted(parts)), max_size=3, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: parts[name] for name in chosen}))


DEFS = {
    "$defs": {"one": {"type": ["integer", "null"]}},
    "definitions": {"two": {"items": {"$ref": "#/definitions/two"}, "type": ["array", "boolean"]}},
}
SCHEMAS = st.recursive(keywords(st.just({})), lambda inner: keywords(inner | st.booleans()), max_leaves=5)


def valid(schema: object, value: object) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


@example({"const": True}, 1)
@example({"enum": [0, "a"]}, False)
@example({"uniqueItems": True}, [1, True, 1.5])
@example({"uniqueItems": True}, [{"a": 1}, {"a": 1.0}])
@settings(deadline=None)
@given(SCHEMAS, JSON)
def test_a_value_is_accepted_exactly_when_jsonschema_accepts_it(schema: dict[str, object], value: object) -> None:
    document = {**schema, **DEFS}
    check_schema(document, "Tool f", document)
    assert accepts(document, value, document) == valid(document, value)  # type: ignore[arg-type]


def readings(text: str) -> list[object]:
    """What a text can be meant as: itself, JSON, or Python's way to write JSON's values."""
    found: list[object] = [text]
    with contextlib.suppress(ValueError):
        found.append(json.loads(text))
    with contextlib.suppress(ValueError, SyntaxError):
        found.append(json.loads(json.dumps(ast.literal_eval(text.strip()))))
    return found


TEXTS = JSON.map(json.dumps) | JSON.map(str) | st.sampled_from(["5.0", "-7", "1e2", "True", "none", "x y", " 4 ", "[1"])


@settings(deadline=None)
@given(SCHEMAS, TEXTS)
def test_if_some_reading_validates_what_arrives_does(schema: dict[str, object], text: str) -> None:
    document = {**schema, **DEFS}
    plain = set(schema) <= {"type", "minLength"}  # where only a string is asked for, the text is what it says
    possible = [reading for reading in readings(text) if not (plain and isinstance(reading, str) and reading != text)]
    if any(valid(document, reading) for reading in possible):
        assert valid(document, typed_value(text, document))


REFERRED = {
    "type": "object",
    "properties": {
        "point": {"$ref": "#/$defs/point"},
        "tree": {"$ref": "#/definitions/tree"},
        "count": {"allOf": [{"$ref": "#/$defs/count"}, {"minimum": 1}]},
    },
    "$defs": {
        "point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "count": {"type": "integer"},
    },
    "definitions": {"tree": {"type": "array", "items": {"$ref": "#/definitions/tree"}}},
}


def test_references_are_followed_into_the_tools_own_definitions() -> None:
    text = call("f", parameter("point", '{"x": 1.5}'), parameter("tree", "[[], [[]]]"), parameter("count", "3"))
    _, calls = read(text, tools=[{"name": "f", "parameters": REFERRED}])
    assert calls == [("f", {"point": {"x": 1.5}, "tree": [[], [[]]], "count": 3})]
    assert valid(REFERRED, calls[0][1])


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "integer"}, "5.0", 5),
        ({"type": "integer"}, "1_000", "1_000"),
        ({"type": "number"}, "1_0.5", "1_0.5"),
        ({"type": "array"}, "[1_000]", "[1_000]"),
        ({"type": "array"}, "['1_000']", ["1_000"]),
        ({"type": "integer"}, "٣", "٣"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "array"}, "[NaN]", "[NaN]"),
        ({"type": "int"}, "5", 5),
        ({"type": "float"}, "5", 5),
        ({"type": "str"}, "5", "5"),
        ({"type": "bool"}, "True", True),
        ({"type": "dict"}, '{"a": 1}', {"a": 1}),
        ({"type": "list"}, "[1]", [1]),
        ({"type": "INTEGER"}, "5", 5),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"enum": [1, 2]}, "1", 1),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"const": True}, "true", True),
        ({"enum": ["a", None]}, '"a"', "a"),
        ({"type": ["string", "integer"]}, "5", 5),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, "None", None),
        ({"oneOf": [{"type": "integer", "maximum": 4}, {"type": "string"}]}, "5", "5"),
        ({"type": "integer", "maximum": 4}, "5", 5),
        ({"minimum": 3}, "5", "5"),
        ({}, "5", "5"),
        (False, "5", "5"),
    ],
)
def test_texts_become_what_the_schema_means(schema: object, text: str, value: object) -> None:
    typed = typed_value(text, schema)
    assert typed == value
    assert type(typed) is type(value)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5_000, '"' + "\\" * 99, "{'a': {1}}", "\ud800", "-" * 50_000 + "1"]
)
@pytest.mark.parametrize("kind", ["integer", "number", "object", "array", "boolean", "null"])
def test_no_text_is_an_error(kind: str, text: str) -> None:
    assert typed_value(text, {"type": kind}) == text
