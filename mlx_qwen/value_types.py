"""Whether a value has the type that an annotation asks for, and how to say in words which one that is."""

import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_LARGEST = sys.float_info.max

# One of them, and several.
_WORDS: dict[object, tuple[str, str]] = {
    bool: ("True or False", "True or False"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    Path: ("a path", "paths"),
    NoneType: ("None", "None"),
    object: ("anything", "anything"),
    Callable: ("a function", "functions"),
    Mapping: ("a dictionary", "dictionaries"),
}


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value has the type: True is no number, text no list, NaN and infinity no float, None only None.

    Names in quotes are not looked at: what they name may belong to a library that is not loaded yet.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if _is(origin, Mapping):
        mapped = isinstance(value, Mapping)
        return mapped and all(fits(key, inner[0]) and fits(item, inner[1]) for key, item in value.items())
    if _is(origin, Sequence):
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        return listed and all(fits(item, inner[0]) for item in value)
    return _is_a(value, origin or annotation)


def _is(origin: object, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _is_a(value: Any, annotation: object) -> bool:
    if annotation is Callable:
        return callable(value)
    if annotation in (int, float):
        kind = Integral if annotation is int else Real
        return isinstance(value, kind) and not isinstance(value, bool) and _is_finite(value)
    if annotation is None:
        return value is None
    if isinstance(annotation, type):
        return isinstance(value, annotation)
    return annotation is Any or isinstance(annotation, str)


def expected_type(annotation: object, *, several: bool = False) -> str:
    """The type in words, such as "a whole number" or "a list of texts"; None is left out of unions."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        named = [expected_type(one, several=several) for one in inner if one is not NoneType]
        return " or ".join(dict.fromkeys(named))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if _is(origin, Sequence):
        return f"{'lists' if several else 'a list'} of {expected_type(inner[0], several=True)}"
    kind = origin or annotation
    if kind in _WORDS:
        return _WORDS[kind][several]
    name = getattr(kind, "__name__", str(kind))
    return f"objects of type {name}" if several else f"an object of type {name}"


def shown(value: object) -> str:
    """A value in an error: as it would be written while that is short, or else its type."""
    if value is None or isinstance(value, Number | str) or type(value) in (list, tuple, dict):
        written = repr(value)
        return written if len(written) <= 80 else f"{written[:77]}..."
    return f"an object of type {type(value).__name__}"


def _is_finite(value: Any) -> bool:
    """Whether a number is, and a float could hold it; whole numbers may be too large for one."""
    return bool(-_LARGEST <= value <= _LARGEST)
