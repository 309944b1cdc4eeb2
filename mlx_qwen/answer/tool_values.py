"""Types the text of a tool call's parameter by its JSON schema."""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from mlx_qwen.answer.schemas import in_place, items, type_names, type_of
from mlx_qwen.answer.validation import accepts
from mlx_qwen.json_types import Json

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_QUOTED_OR_GROUPED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|([0-9]_[0-9])", re.DOTALL)
_WORDS: dict[str, Json] = {"null": None, "none": None, "true": True, "false": False}
_EXACT = 2**53

# Beside a plain string these change nothing: whatever they say, the text has no other reading.
_SILENT = {"type", "title", "description", "default", "examples", "example", "format", "deprecated", "readOnly"}
_SILENT |= {"writeOnly", "minLength", "maxLength", "contentMediaType", "contentEncoding", "$comment"}


def typed_value(text: str, schema: object, root: object = None) -> Json:
    """The value that `text` stands for under a JSON schema whose references point into `root`.

    Of its readings (null, boolean, number, object, array, string) the first that the schema accepts; where it accepts
    none, the first of a type that it names; else the text itself. Booleans, null and structures are also read as Python
    writes them, because Qwen's chat template shows the model such history.
    """
    root = schema if root is None else root
    kinds = _kinds(schema, root)
    if is_plain_text(schema, root) or (not kinds and accepts(schema, text, root)):
        return text
    readings = list(_readings(text, kinds))
    for reading in readings:
        if accepts(schema, reading, root):
            return reading
    named = (reading for reading in readings if type_of(reading) in kinds)
    return next(named, text)


def is_plain_text(schema: object, root: object) -> bool:
    """Whether the text itself is the value, whatever it says: for a string, and where nothing is asked for."""
    if not isinstance(schema, Mapping):
        return True
    silent = all(key in _SILENT for key in schema)
    return silent and type_names(schema) in (None, frozenset({"string"}))


def _kinds(schema: object, root: object) -> frozenset[str]:
    """Every type that the schema, or a part that judges the same value, names or gives an example of."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = type_names(schema) or frozenset()
    examples = [*([schema["const"]] if "const" in schema else []), *items(schema.get("enum"))]
    kinds = kinds.union(type_of(example) for example in examples)
    kinds = kinds | {"integer"} if "number" in kinds else kinds
    return kinds.union(*(_kinds(part, root) for part in in_place(schema, root)))


def _readings(text: str, kinds: frozenset[str]) -> Iterator[Json]:
    word = text.strip()
    if word.lower() in _WORDS:
        yield _WORDS[word.lower()]
    number = _attempt(partial(_number, whole="number" not in kinds), word)
    if number is not None:
        yield number
    for read in (parse_json, _python):
        value = _attempt(read, word)
        if isinstance(value, dict | list):
            yield value
    yield text
    quoted = _attempt(parse_json, word) if word.startswith('"') else None
    if isinstance(quoted, str):
        yield quoted


def _attempt(read: Callable[[str], Json], text: str) -> Json:
    try:
        return read(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _number(text: str, *, whole: bool) -> Json:
    """A number as it is written; `whole`: 5.0 as the integer 5."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    value = _finite(text)
    return int(value) if whole and value.is_integer() and abs(value) < _EXACT else value


def parse_json(text: str) -> Json:
    """JSON as models write it, with line breaks in strings; ValueError for what is none, NaN and infinity too."""
    value: Json = json.loads(text, strict=False, parse_constant=_finite, parse_float=_finite)
    return value


def _python(text: str) -> Json:
    if any(found[1] for found in _QUOTED_OR_GROUPED.finditer(text)):
        raise ValueError(text)  # 1_000 is a number in Python alone
    return parse_json(json.dumps(ast.literal_eval(text)))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value
