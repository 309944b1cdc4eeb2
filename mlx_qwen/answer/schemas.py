"""JSON schemas of tool parameters: whether they make sense, and what they accept.

Covers the keywords of draft 2020-12 that judge a value by itself, those of older drafts that tools still use, OpenAPI's
`nullable`, and the short type names of other languages. References are followed inside of the tool's own schema.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json

Schema: TypeAlias = Mapping[str, object]

_ALIASES = {
    **{name: name for name in ("null", "boolean", "integer", "number", "string", "object", "array")},
    **{"none": "null", "nonetype": "null", "bool": "boolean", "int": "integer", "long": "integer"},
    **{"float": "number", "double": "number", "decimal": "number", "str": "string", "text": "string"},
    **{"dict": "object", "map": "object", "list": "array", "tuple": "array"},
}
_EVERY = frozenset(_ALIASES.values())
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_ONE = ("not", "if", "then", "else", "items", "additionalItems", "additionalProperties", "contains", "propertyNames")
_MANY = (*_IN_PLACE, "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NUMBERS = (
    *("minimum", "maximum", "multipleOf", "minLength", "maxLength", "minItems", "maxItems"),
    *("minProperties", "maxProperties", "minContains", "maxContains"),
)


def check_schema(schema: object, where: str, root: object) -> None:
    """Raises PromptError, with the place, for a schema that means nothing; `root` is what its references point into."""
    try:
        _check(schema, where, root)
        _check_circles(schema, where, root, [], set())
    except RecursionError:
        raise PromptError(f"{where} is nested too deeply. Describe the parameters in fewer levels.") from None


def type_names(schema: Schema) -> frozenset[str] | None:
    """The types that the schema names itself, by their names in JSON schema; None when it names none."""
    named = schema.get("type")
    if named is None:
        return None
    names = {str(name).lower() for name in ([named] if isinstance(named, str) else items(named))}
    types = _EVERY if "any" in names else {_ALIASES.get(name, name) for name in names}
    return frozenset({*types, "null"} if schema.get("nullable") is True else types)


def target(schema: Schema, root: object) -> object:
    """What the schema's `$ref` points to; None when it has none, or one that leads out of `root`."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found: object = root
    for part in reference.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~").replace("%25", "%")
        if isinstance(found, Mapping):
            found = found.get(key)
        else:
            listed = items(found)
            found = listed[int(key)] if key.isdecimal() and int(key) < len(listed) else None
    return found


def type_of(value: Json) -> str:
    """JSON schema's name for the type of a value; whole numbers are integers, 5.0 too."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array"


def _check(schema: object, where: str, root: object) -> None:
    if isinstance(schema, bool) or schema is None:
        return
    if not isinstance(schema, Mapping):
        raise PromptError(f"{where} is {schema!r:.60}; a JSON schema is a dictionary.")
    _check_type(schema, where)
    reference = schema.get("$ref")
    local = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
    if local and not isinstance(target(schema, root), Mapping | bool):
        raise PromptError(f"{where}: $ref {reference!r} leads nowhere. Add its schema to $defs, or correct the name.")
    if "enum" in schema and not _is_list(schema["enum"]):
        raise PromptError(f"{where}: enum is {schema['enum']!r:.60}; expected a list of values.")
    for key in _NUMBERS:
        number = schema.get(key)
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise PromptError(f"{where}: {key} is {number!r:.60}; expected a number.")
    if schema.get("multipleOf") == 0:
        raise PromptError(f"{where}: multipleOf is 0; expected a number above it.")
    _check_pattern(schema.get("pattern"), where)
    for key in mapping(schema.get("patternProperties")):
        _check_pattern(key, where)
    _check_parts(schema, where, root)


def _check_type(schema: Schema, where: str) -> None:
    named = schema.get("type")
    if named is None:
        return
    names = [named] if isinstance(named, str) else items(named)
    wrong = [name for name in names if not isinstance(name, str) or name.lower() not in {*_ALIASES, "any"}]
    if wrong or not names:
        found = wrong[0] if wrong else named
        raise PromptError(f"{where}: type is {found!r:.60}; JSON schema knows {', '.join(sorted(_EVERY))}.")


def _check_pattern(pattern: object, where: str) -> None:
    if pattern is None or (isinstance(pattern, str) and "\\p{" in pattern.lower()):
        return  # Unicode classes are right in ECMAScript, and Python has none
    try:
        re.compile(pattern if isinstance(pattern, str) else "[")
    except re.error as error:
        raise PromptError(f"{where}: pattern {pattern!r:.60} is no regular expression ({error}).") from None


def _check_parts(schema: Schema, where: str, root: object) -> None:
    for key in _NAMED:
        parts = schema.get(key)
        if parts is not None and not isinstance(parts, Mapping):
            raise PromptError(f"{where}: {key} is {parts!r:.60}; expected a dictionary of schemas.")
        for name, part in (parts or {}).items():
            _check(part, f"{where}, {name}" if key == "properties" else f"{where}, {key} {name}", root)
    for key in _MANY:
        if key in schema and (not _is_list(schema[key]) or not schema[key]):
            raise PromptError(f"{where}: {key} is {schema[key]!r:.60}; expected a list of schemas, not an empty one.")
    for key in (*_ONE, *_MANY):
        part = schema.get(key)
        for one in items(part) if _is_list(part) else [part]:
            _check(one, f"{where}, {key}", root)


def _check_circles(schema: object, where: str, root: object, above: list[int], done: set[int]) -> None:
    """A schema that consists of itself, and would be asked about the same value for ever, means nothing."""
    if not isinstance(schema, Mapping) or id(schema) in done:
        return
    if id(schema) in above:
        raise PromptError(f"{where}: a schema refers to itself without a property or item between. Remove the circle.")
    above.append(id(schema))
    for part in in_place(schema, root):
        _check_circles(part, where, root, above, done)
    above.pop()
    done.add(id(schema))
    inner = [part for key in _NAMED for part in mapping(schema.get(key)).values()]
    inner += [part for key in ("items", "additionalProperties", "contains") if (part := schema.get(key)) is not None]
    for part in inner:
        _check_circles(part, where, root, [], done)


def in_place(schema: Schema, root: object) -> list[object]:
    """The schemas that judge the same value as `schema` does."""
    parts = [target(schema, root), *(schema.get(key) for key in ("not", "if", "then", "else"))]
    return [*parts, *(part for key in _IN_PLACE for part in items(schema.get(key)))]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def items(value: object) -> Sequence[object]:
    """A keyword's list; empty where there is none."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else ()


def mapping(value: object) -> Mapping[str, object]:
    """A keyword's dictionary; empty where there is none."""
    return value if isinstance(value, Mapping) else {}
