"""Flags that `generate` and `chat` share, named as mlx-lm and mlx-vlm name them."""

import os
from collections.abc import Callable

import click

from mlx_qwen.cli.flags import Flag, flags_of, with_flags
from mlx_qwen.cli.reading import GrammarFile, SchemaText, ToolsFile
from mlx_qwen.cli.several import pipeline_flag
from mlx_qwen.options import GenerationOptions
from mlx_qwen.settings import EngineSettings


def model_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --model, --revision, --pipeline and --no-tune."""
    flags: list[Flag] = [
        click.option(
            "--model",
            metavar="PATH|REPO",
            help="Model folder, or repository on the Hugging Face Hub.  [default: the bundled demo]",
        ),
        click.option("--revision", help="Branch, tag or commit of the repository."),
        pipeline_flag,
        click.option(
            "--no-tune",
            is_flag=True,
            expose_value=False,
            callback=_without_tuning,
            help="Believe the kernels, instead of trying them on this Mac when it first meets a model's sizes.",
        ),
    ]
    return with_flags(flags, function)


def _without_tuning(context: click.Context, flag: click.Parameter, given: bool) -> None:
    if given:
        from mlx_qwen.model.proving import TUNE

        os.environ[TUNE] = "0"


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
            schema={"type": SchemaText()},
            grammar={"type": GrammarFile()},
        ),
    ]
    return lambda function: with_flags(flags, function)


def chosen_model(model: str | None) -> str | None:
    """The --model flag; without it None, the bundled demo, and a word on stderr that it is used."""
    if model is None:
        click.echo("No --model given: using the bundled demo, a tiny model for trying things out.", err=True)
    return model
