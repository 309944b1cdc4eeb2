"""Fifty JSON schemas as people write them. Each bounds its texts and lists, so that random weights come to an end."""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "maxLength": 8}
WORD: Schema = {"type": "string", "pattern": "^[a-z]{2,6}$"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 99}


def record(required: list[str] | None = None, **properties: object) -> Schema:
    """An object with these properties alone, all of them required unless some are named."""
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def listed(items: object, least: int = 0, most: int = 3) -> Schema:
    """A list of so many."""
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def pointed(name: str, **definitions: object) -> Schema:
    """A reference into definitions."""
    return {"$ref": f"#/$defs/{name}", "$defs": definitions}


SCALARS: dict[str, Schema] = {
    "text": TEXT,
    "text of a length": {"type": "string", "minLength": 3, "maxLength": 5},
    "text by a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "text with a part by a pattern": {"type": "string", "pattern": "[0-9]x", "maxLength": 9},
    "integer": COUNT,
    "integer above and below": {"type": "integer", "exclusiveMinimum": -4, "exclusiveMaximum": 12},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "number": {"type": "number"},
    "number in a range": {"type": "number", "minimum": -1, "maximum": 1},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "constant": {"const": {"a": [1, None, "ü"]}},
    "enum of texts": {"enum": ["red", "green", "blue sky"]},
    "enum of anything": {"enum": [1, "1", None, True, [1, 2], {"k": "v"}]},
    "enum of unicode": {"enum": ["größer", "日本", "🙂", "naïve", 'quote " and \\ slash', "line\nbreak"]},
    "types": {"type": ["integer", "boolean", "null"]},
}
FORMATTED: dict[str, Schema] = {
    name: {"type": "string", "format": name}
    for name in ("date", "time", "date-time", "uuid", "ipv4", "ipv6", "duration")
}
LISTS: dict[str, Schema] = {
    "list": listed(COUNT),
    "list of a length": listed({"type": "boolean"}, 2, 2),
    "list of lists": listed(listed({"enum": [0, 1]}, 1, 2), 1, 2),
    "tuple": {"type": "array", "prefixItems": [WORD, COUNT, {"type": "null"}], "items": False, "minItems": 3},
    "tuple and more": {"type": "array", "prefixItems": [WORD], "items": COUNT, "minItems": 1, "maxItems": 3},
    "list of records": listed(record(id=COUNT, ok={"type": "boolean"}), 1),
    "list of a union": listed({"anyOf": [WORD, COUNT, {"type": "null"}]}),
}
RECORDS: dict[str, Schema] = {
    "record": record(name=TEXT, age=COUNT),
    "nothing required": record([], a=COUNT, b={"type": "boolean"}),
    "some required": record(["b"], a=COUNT, b={"type": "boolean"}, c={"type": "null"}),
    "nested": record(a=record(b=record(c=record(d={"enum": [1, 2]})))),
    "keys of unicode": record(**{"größe": COUNT, "名前": WORD, "emoji 🙂": {"type": "null"}, 'a "quoted" key': COUNT}),
    "empty": record(),
    "keys by a pattern": {
        "type": "object",
        "patternProperties": {"^[a-z]{1,3}$": COUNT},
        "additionalProperties": False,
    },
    "others allowed, by a schema": {
        "type": "object",
        "properties": {"a": COUNT},
        "required": ["a"],
        "patternProperties": {"^x_[a-z]$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "lists inside": record(tags=listed(WORD), scores=listed({"type": "number"}, 1, 2)),
    "nullable by types": record(a={"type": ["string", "null"], "maxLength": 4}),
    "titles and defaults": record(a={**COUNT, "title": "A", "description": "of a", "default": 3, "examples": [1]}),
}
COMBINED: dict[str, Schema] = {
    "any of": {"anyOf": [record(a=COUNT), record(b=WORD)]},
    "one of, told apart": {
        "oneOf": [record(kind={"const": "cat"}, lives=COUNT), record(kind={"const": "dog"}, name=WORD)]
    },
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "reference": pointed("point", point=record(x=COUNT, y=COUNT)),
    "references in a list": {**listed({"$ref": "#/$defs/p"}, 1), "$defs": {"p": record(x=COUNT)}},
    "old definitions": {**record(a={"$ref": "#/definitions/w"}), "definitions": {"w": WORD}},
    "recursion in a list": pointed("tree", tree=record(value=COUNT, children=listed({"$ref": "#/$defs/tree"}, 0, 1))),
    "recursion or null": pointed(
        "item", item=record(v=COUNT, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/item"}]})
    ),
    "recursion of two": pointed(
        "a", a=record(["n"], n=COUNT, b={"$ref": "#/$defs/b"}), b=record(["m"], m=WORD, a={"$ref": "#/$defs/a"})
    ),
}
FIFTY: dict[str, Schema] = {**SCALARS, **FORMATTED, **LISTS, **RECORDS, **COMBINED}
