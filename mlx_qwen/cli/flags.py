"""Flags of the command line, made from options that are declared once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
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
        click.option(*one.flags, field.name, **{**_settings(field.type, field.default), **_texts(one), **changed})
        for field, one in declared(*classes)
        if one.flags and field.name not in without
        for changed in [changes.get(field.name, {})]
    ]
    return lambda function: with_flags(made, function)


def with_flags(flags: Sequence[Flag], function: Callable[..., None]) -> Callable[..., None]:
    """Adds flags so that help lists them in this order."""
    for flag in reversed(flags):
        function = flag(function)
    return function


def _texts(declaration: Declaration) -> dict[str, Any]:
    text = declaration.help
    return {"help": text[0].upper() + text[1:], "metavar": declaration.metavar}


def _settings(annotation: object, default: object) -> dict[str, Any]:
    """The arguments of `click.option` that type and default ask for."""
    kinds = [one for one in _parts(annotation) if one is not NoneType]
    settings: dict[str, Any] = {"default": None if default is MISSING else default}
    lists = [one for one in kinds if isinstance(origin := get_origin(one), type) and issubclass(origin, Sequence)]
    if lists:
        return {"multiple": True, "type": _click_type(_parts(get_args(lists[0])[0]))}
    if kinds == [bool]:
        return {**settings, "is_flag": True}
    return {**settings, "type": _click_type(kinds), "show_default": default is not None}


def _parts(annotation: object) -> Sequence[object]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _click_type(kinds: Sequence[object]) -> click.ParamType[Any] | type:
    if all(get_origin(kind) is Literal for kind in kinds):
        return click.Choice([choice for kind in kinds for choice in get_args(kind)])
    if list(kinds) == [Path]:
        return click.Path(path_type=Path)
    return next((kind for kind in (int, float) if list(kinds) == [kind]), str)
