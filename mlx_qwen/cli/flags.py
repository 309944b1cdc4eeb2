"""Flags of the command line, made from options that are declared once."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

from mlx_qwen.declared import Declaration, Declared, declared

Flag = Callable[[Callable[..., None]], Callable[..., None]]


def flags_of(*classes: type[Declared], without: Sequence[str] = (), **changes: Mapping[str, Any]) -> Flag:
    """Adds a flag for each declared option that has one, in their order, under the option's name.

    Type, default and help are the declaration's, and errors in values its own: no flag checks a range. An option in
    `without` gets none; `changes` gives arguments of `click.option` by the option's name, such as another default.
    """
    made = [
        click.option(*one.flags, field.name, **{**_settings(field, one), **changes.get(field.name, {})})
        for field, one in declared(*classes)
        if one.flags and field.name not in without
    ]
    return lambda function: with_flags(made, function)


def with_flags(flags: Sequence[Flag], function: Callable[..., None]) -> Callable[..., None]:
    """Adds flags so that help lists them in this order."""
    for flag in reversed(flags):
        function = flag(function)
    return function


def _settings(field: Field[Any], declaration: Declaration) -> dict[str, Any]:
    """The arguments of `click.option` that a declaration gives."""
    help_ = declaration.help[0].upper() + declaration.help[1:]
    texts = {"help": help_, "metavar": declaration.metavar}
    default = None if field.default is MISSING else field.default
    kinds = [one for one in _parts(field.type) if one is not NoneType]
    lists = [one for one in kinds if isinstance(origin := get_origin(one), type) and issubclass(origin, Sequence)]
    if lists:
        kind = _click_type(_parts(get_args(lists[0])[0]))
        return {**texts, "help": f"{help_} May be repeated.", "multiple": True, "type": kind}
    dictionaries = [one for one in kinds if isinstance(origin := get_origin(one), type) and issubclass(origin, Mapping)]
    if dictionaries and dictionaries == kinds:
        return {**texts, "default": default, "type": JsonObject(get_args(dictionaries[0])[0])}
    if kinds == [bool]:
        return {**texts, "default": default, "is_flag": True}
    return {**texts, "default": default, "type": _click_type(kinds), "show_default": default is not None}


class JsonObject(click.ParamType[Any]):
    """A JSON object; its keys are texts, or whole numbers where `keys` is int."""

    name = "json"

    def __init__(self, keys: object) -> None:
        self._keys: type[int] | type[str] = int if keys is int else str

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> dict[Any, Any]:
        """The object as a dictionary."""
        if isinstance(value, dict):
            return value
        try:
            read = json.loads(str(value))
            return {self._keys(key): item for key, item in read.items()}
        except (ValueError, AttributeError, RecursionError):
            example = '{"1234": -100}' if self._keys is int else '{"name": "value"}'
            self.fail(f"{value!r:.60} is no JSON object; expected one like '{example}'.", param, ctx)


def _parts(annotation: object) -> Sequence[object]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _click_type(kinds: Sequence[object]) -> click.ParamType[Any] | type:
    if all(get_origin(kind) is Literal for kind in kinds):
        return click.Choice([choice for kind in kinds for choice in get_args(kind)])
    if list(kinds) == [Path]:
        return click.Path(path_type=Path)
    return next((kind for kind in (int, float) if list(kinds) == [kind]), str)
