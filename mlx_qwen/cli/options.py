"""Flags that `generate` and `chat` share, named as mlx-lm and mlx-vlm name them."""

import json
from collections.abc import Callable
from pathlib import Path

import click

from mlx_qwen.cli.flags import Flag, flags_of, with_flags
from mlx_qwen.cli.reading import ToolsFile
from mlx_qwen.options import EngineSettings, GenerationOptions


def model_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --model and --revision."""
    flags: list[Flag] = [
        click.option(
            "--model",
            metavar="PATH|REPO",
            help="Model folder, or repository on the Hugging Face Hub.  [default: the bundled demo]",
        ),
        click.option("--revision", help="Branch, tag or commit of the repository."),
    ]
    return with_flags(flags, function)


def generation_flags(*, max_tokens: int, media: bool = True) -> Flag:
    """Adds --system-prompt and the flags of `OptionKeywords`, without `media` none for images and videos to show."""
    flags: list[Flag] = [
        click.option("--system-prompt", help="System message."),
        flags_of(
            GenerationOptions,
            EngineSettings,
            without=() if media else ("images", "videos"),
            max_tokens={"default": max_tokens},
            tools={"type": ToolsFile(), "multiple": False, "help": "JSON file of functions that the model may call."},
            schema={"callback": _schema_of},
            grammar={"callback": _text_of},
        ),
    ]
    return lambda function: with_flags(flags, function)


def _schema_of(_: click.Context, __: click.Parameter, given: str | None) -> dict[str, object] | None:
    """A JSON schema that was given as JSON, or as the file that holds it."""
    if given is None:
        return None
    text = given if given.lstrip().startswith("{") else _read(given)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"{given!r:.60} is no JSON ({error}).") from error
    if not isinstance(schema, dict):
        raise click.BadParameter(f"{given!r:.60} holds no JSON object; expected a JSON schema.")
    return schema


def _text_of(_: click.Context, __: click.Parameter, file: str | None) -> str | None:
    return None if file is None else _read(file)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{file!r:.60} cannot be read ({error}).") from error


def chosen_model(model: str | None) -> str | None:
    """The --model flag; without it None, the bundled demo, and a word on stderr that it is used."""
    if model is None:
        click.echo("No --model given: using the bundled demo, a tiny model for trying things out.", err=True)
    return model
