"""Whether a value is what a JSON schema asks for, as draft 2020-12 defines it."""

import re
from collections.abc import Callable, Mapping, Sequence

from mlx_qwen.answer.schemas import Schema, items, mapping, target, type_names, type_of
from mlx_qwen.json_types import Json


def accepts(schema: object, value: Json, root: object) -> bool:
    """Whether `schema` accepts `value`; references point into `root`. Unknown keywords say nothing.

    The schema must have passed `check_schema`.
    """
    if not isinstance(schema, Mapping):
        return schema is not False
    if value is None and schema.get("nullable") is True:
        return True
    return all(test(schema, value, root) for test in _TESTS)


def same(one: Json, other: Json) -> bool:
    """JSON's equality: 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def _type(schema: Schema, value: Json, root: object) -> bool:
    names, found = type_names(schema), type_of(value)
    return names is None or found in names or (found == "integer" and "number" in names)


def _listed(schema: Schema, value: Json, root: object) -> bool:
    if "const" in schema and not same(value, schema["const"]):  # type: ignore[arg-type]
        return False
    return "enum" not in schema or any(same(value, one) for one in items(schema["enum"]))  # type: ignore[arg-type]


def _combined(schema: Schema, value: Json, root: object) -> bool:
    def matches(part: object) -> bool:
        return accepts(part, value, root)

    if not matches(target(schema, root)) or not all(map(matches, items(schema.get("allOf")))):
        return False
    if "anyOf" in schema and not any(map(matches, items(schema["anyOf"]))):
        return False
    if "oneOf" in schema and sum(map(matches, items(schema["oneOf"]))) != 1:
        return False
    if "not" in schema and matches(schema["not"]):
        return False
    return "if" not in schema or matches(schema.get("then" if matches(schema["if"]) else "else"))


def _number(schema: Schema, value: Json, root: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    above, below = low if above is True else above, high if below is True else below  # draft 4 said it so
    return (
        _holds(low, lambda limit: value >= limit)
        and _holds(high, lambda limit: value <= limit)
        and _holds(above, lambda limit: value > limit)
        and _holds(below, lambda limit: value < limit)
        and _holds(schema.get("multipleOf"), lambda step: _is_multiple(value, step))
    )


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        return (value / step).is_integer()
    except OverflowError:
        return False


def _text(schema: Schema, value: Json, root: object) -> bool:
    if not isinstance(value, str):
        return True
    return _within(schema, "Length", len(value)) and _matches(schema.get("pattern"), value)


def _matches(pattern: object, text: str) -> bool:
    try:
        return not isinstance(pattern, str) or re.search(pattern, text) is not None
    except re.error:  # Unicode classes, which Python lacks
        return True


def _array(schema: Schema, value: Json, root: object) -> bool:
    if not isinstance(value, list):
        return True
    return _items_match(schema, value, root) and _counts_match(schema, value, root)


def _items_match(schema: Schema, value: list[Json], root: object) -> bool:
    first, rest = items(schema.get("prefixItems")), schema.get("items")
    if isinstance(rest, Sequence):  # a tuple, before draft 2020-12
        first, rest = rest, schema.get("additionalItems")
    if not all(accepts(part, item, root) for part, item in zip(first, value, strict=False)):
        return False
    return all(accepts(rest, item, root) for item in value[len(first) :])


def _counts_match(schema: Schema, value: list[Json], root: object) -> bool:
    if not _within(schema, "Items", len(value)):
        return False
    if "contains" in schema:
        count = sum(accepts(schema["contains"], item, root) for item in value)
        if not _within({"minContains": 1, **schema}, "Contains", count):
            return False
    if schema.get("uniqueItems") is not True:
        return True
    return not any(same(one, other) for index, one in enumerate(value) for other in value[:index])


def _object(schema: Schema, value: Json, root: object) -> bool:
    if not isinstance(value, dict):
        return True
    if not _within(schema, "Properties", len(value)) or not _has_all(schema.get("required"), value):
        return False
    for key, needed in mapping(schema.get("dependentRequired")).items():
        if key in value and not _has_all(needed, value):
            return False
    for key, part in mapping(schema.get("dependentSchemas")).items():
        if key in value and not accepts(part, value, root):
            return False
    if not all(accepts(schema.get("propertyNames"), key, root) for key in value):
        return False
    return all(_property(schema, key, item, root) for key, item in value.items())


def _property(schema: Schema, key: str, item: Json, root: object) -> bool:
    properties = mapping(schema.get("properties"))
    patterns = mapping(schema.get("patternProperties"))
    parts = [part for pattern, part in patterns.items() if _matches(pattern, key)]
    parts += [properties[key]] if key in properties else []
    return all(accepts(part, item, root) for part in parts or [schema.get("additionalProperties")])


def _within(schema: Schema, what: str, count: int) -> bool:
    least, most = schema.get(f"min{what}"), schema.get(f"max{what}")
    return _holds(least, lambda limit: count >= limit) and _holds(most, lambda limit: count <= limit)


def _holds(limit: object, test: Callable[[float], bool]) -> bool:
    return isinstance(limit, bool) or not isinstance(limit, int | float) or test(limit)


def _has_all(keys: object, value: dict[str, Json]) -> bool:
    return all(key in value for key in items(keys))


_TESTS: tuple[Callable[[Schema, Json, object], bool], ...] = (
    *(_type, _listed, _combined, _number, _text, _array, _object),
)
