"""JSON schemas of Python types: pydantic models, dataclasses, TypedDicts, and what their fields are made of."""

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from mlx_qwen.errors import PromptError

_NAMES: dict[object, str] = {
    **{str: "string", int: "integer", float: "number", bool: "boolean"},
    **{None: "null", types.NoneType: "null"},
}
Described = dict[str, Any]


def schema_of(cls: type) -> Described:
    """The JSON schema of a type; PromptError for one that has none.

    Pydantic models describe themselves. Fields of dataclasses without a default and keys of a TypedDict that are not
    NotRequired are required. No others are allowed unless a pydantic model says so.
    """
    known: dict[type, str] = {}
    definitions: Described = {}
    schema = _described(cls, known, definitions)
    return {**schema, "$defs": definitions} if definitions else schema


def _described(kind: Any, known: dict[type, str], definitions: Described) -> Described:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Annotated, Required, NotRequired):
        return _described(inner[0], known, definitions)
    plain = _plain(kind, origin, inner)
    if plain is not None:
        return plain
    parts = [_described(part, known, definitions) for part in inner if part is not ...]
    if origin in (Union, types.UnionType):
        return {"anyOf": parts}
    return _container(origin or kind, inner, parts) or _named(kind, known, definitions)


def _plain(kind: Any, origin: object, inner: tuple[object, ...]) -> Described | None:
    """The schema of a type that holds no other."""
    if kind in (Any, object):
        return {}
    if kind in _NAMES:
        return {"type": _NAMES[kind]}
    if origin is Literal:
        return {"enum": list(inner)}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return None


def _container(base: object, inner: tuple[object, ...], parts: list[Described]) -> Described | None:
    """The schema of a dictionary, list, set or tuple."""
    if not isinstance(base, type) or is_typeddict(base) or base in (str, bytes):
        return None
    if base is tuple and inner and inner[-1] is not ...:
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if issubclass(base, Mapping):
        return {"type": "object", "additionalProperties": parts[1] if parts else True}
    if issubclass(base, Sequence | set | frozenset):
        return {"type": "array", "items": parts[0]} if parts else {"type": "array"}
    return None


def _named(kind: Any, known: dict[type, str], definitions: Described) -> Described:
    """A class with fields, described once and referred to, so that it may hold itself."""
    if isinstance(kind, type) and kind not in known:
        name = kind.__name__ if kind.__name__ not in definitions else f"{kind.__name__}{len(known)}"
        known[kind] = name
        if hasattr(kind, "model_json_schema"):
            definitions[name] = _hoisted(kind.model_json_schema(ref_template=_REFERENCE), definitions)
        elif is_dataclass(kind) or is_typeddict(kind):
            definitions[name] = {}  # its place, before those that it holds
            definitions[name] = _fields(kind, known, definitions)
        else:
            raise PromptError(
                f"{kind.__name__} has no JSON schema; expected a pydantic model, dataclass or TypedDict, its fields "
                "of text, numbers, True or False, None, lists, dictionaries, Literal, Enum and these."
            )
    if not isinstance(kind, type):
        raise PromptError(f"{kind!r:.60} has no JSON schema; expected a type with fields.")
    return {"$ref": f"#/$defs/{known[kind]}"}


_REFERENCE = "#/$defs/{model}"


def _hoisted(schema: Described, definitions: Described) -> Described:
    """A pydantic schema whose definitions stand with the others; objects hold nothing beside their fields."""
    hoisted = schema.pop("$defs", {})
    for one in (schema, *hoisted.values()):
        if "properties" in one:
            one.setdefault("additionalProperties", False)
    definitions.update(hoisted)
    return schema


def _fields(kind: Any, known: dict[type, str], definitions: Described) -> Described:
    hints = get_type_hints(kind, include_extras=True)
    if is_dataclass(kind):
        taken = [one for one in fields(kind) if one.init]
        names = [one.name for one in taken]
        required = [one.name for one in taken if one.default is MISSING and one.default_factory is MISSING]
    else:
        names = list(hints)
        required = [name for name in names if name in kind.__required_keys__]
    return {
        "type": "object",
        "properties": {name: _described(hints[name], known, definitions) for name in names},
        "required": required,
        "additionalProperties": False,
    }
