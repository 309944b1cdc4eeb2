"""Types the text of a tool call's parameter by its JSON schema."""

import ast
import json
import math
from collections.abc import Callable, Mapping, Sequence

from mlx_qwen.json_types import Json


def typed_value(text: str, schema: object) -> Json:
    """The value that `text` stands for under a JSON schema; the text itself when it fits none of the schema's types.

    Booleans and null are also read as Python writes them, because Qwen's chat template shows the model such history.
    """
    kinds = _kinds(schema)
    for kind, convert in _CONVERTERS.items():
        if kind in kinds:
            try:
                return convert(text)
            except (ValueError, SyntaxError, TypeError, RecursionError):
                continue
    return text


def _kinds(schema: object) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type", ())
    kinds = {named} if isinstance(named, str) else {str(kind) for kind in named}
    for choice in ("anyOf", "oneOf"):
        alternatives = schema.get(choice, ())
        if isinstance(alternatives, Sequence):
            kinds = kinds.union(*(_kinds(alternative) for alternative in alternatives))
    return kinds


def _null(text: str) -> None:
    if text.strip().lower() not in ("null", "none"):
        raise ValueError(text)


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in ("true", "false"):
        raise ValueError(text)
    return word == "true"


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _structure(kind: type) -> Callable[[str], Json]:
    def convert(text: str) -> Json:
        try:
            value: Json = json.loads(text)
        except json.JSONDecodeError:
            value = json.loads(json.dumps(ast.literal_eval(text.strip())))
        if not isinstance(value, kind):
            raise ValueError(text)
        return value

    return convert


_CONVERTERS: dict[str, Callable[[str], Json]] = {
    "null": _null,
    "boolean": _boolean,
    "integer": int,
    "number": _number,
    "object": _structure(dict),
    "array": _structure(list),
}
