"""Values of options as they are typed: `/set temperature 0.7`."""

import json
from collections.abc import Mapping
from contextlib import suppress

from mlx_qwen.declared import declared
from mlx_qwen.errors import PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.settings import EngineSettings
from mlx_qwen.value_types import fits

_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_HIDDEN = ("progress", "sampler", "logits_processors", "images", "videos", "tools")
_ELSEWHERE = {"images": "/image PATH", "videos": "/video PATH", "tools": "/tools FILE"}


def typed_option(text: str) -> dict[str, object]:
    """An option and its value, as the keyword that they are: a name, then a word, a number or JSON.

    `default` stands for the option's default. Whether there is such an option, and whether it can have the value, is
    left to whoever takes the keyword. Raises PromptError where there is no value, or another command sets it.
    """
    name, value = (*text.replace("=", " ", 1).split(maxsplit=1), "", "")[:2]
    name = name.strip("-").replace("-", "_")
    fields = {field.name: field for field, _ in declared(GenerationOptions, EngineSettings)}
    fields |= {
        flag.strip("-").replace("-", "_"): field
        for field, one in declared(GenerationOptions, EngineSettings)
        for flags in one.flags
        for flag in flags.split("/")[:1]
    }
    if name not in fields:
        return {name: value}
    field = fields[name]
    if field.name in _ELSEWHERE:
        raise PromptError(f"{_ELSEWHERE[field.name]} is the command for {field.name}.")
    if not value:
        raise PromptError(f"{field.name} needs a value, such as /set temperature 0.7; default takes the choice back.")
    if value.lower() == "default":
        return {field.name: field.default}
    readings = _readings(value)
    fitting = (one for one in readings if fits(one, field.type))
    return {field.name: next(fitting, readings[0])}


def _readings(value: str) -> list[object]:
    """What a value may mean, the likeliest first."""
    readings: list[object] = [_WORDS[value.lower()]] if value.lower() in _WORDS else []
    with suppress(ValueError, RecursionError):
        read = json.loads(value)
        readings.append(read)
        # JSON has no numbers as keys, where the ids of tokens are some.
        if isinstance(read, dict) and all(key.isdecimal() for key in read):
            readings.append({int(key): part for key, part in read.items()})
    return [*readings, value, *([None] if value.lower() == "none" else [])]


def option_names() -> list[str]:
    """The options that can be typed."""
    return sorted(field.name for field, _ in declared(GenerationOptions, EngineSettings) if field.name not in _HIDDEN)


def chosen_options(*values: GenerationOptions | EngineSettings) -> Mapping[str, object]:
    """The options that differ from their defaults, by name."""
    return {
        field.name: getattr(value, field.name)
        for value in values
        for field, _ in declared(type(value))
        if getattr(value, field.name) not in (field.default, ()) and field.name not in _HIDDEN
    }
