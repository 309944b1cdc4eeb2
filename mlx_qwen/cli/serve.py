"""`mlx-qwen serve`: OpenAI's and Anthropic's protocols over the engine."""

import os
from typing import Any

import click

from mlx_qwen.cli.flags import Flag, flags_of, with_flags
from mlx_qwen.cli.several import load_here, pipeline_flag
from mlx_qwen.declared import chosen
from mlx_qwen.distributed.environment import own_rank
from mlx_qwen.errors import PromptError
from mlx_qwen.keywords import options_and_settings
from mlx_qwen.options import GenerationOptions
from mlx_qwen.server.settings import ServerSettings
from mlx_qwen.settings import EngineSettings

_KEY = "MLX_QWEN_API_KEY"
# What belongs to a request alone.
_NOT_HERE = ("images", "videos", "stop", "seed")


def _flags() -> Flag:
    return lambda function: with_flags(
        [
            click.option(
                "--model",
                "models",
                multiple=True,
                metavar="PATH|REPO",
                help="Model folder, or repository on the Hugging Face Hub. May be repeated; the first answers requests "
                "that name none.  [default: the bundled demo]",
            ),
            pipeline_flag,
            flags_of(ServerSettings),
            flags_of(GenerationOptions, EngineSettings, without=_NOT_HERE, max_tokens={"default": 32768}),
        ],
        function,
    )


@click.command()
@_flags()
def command(models: tuple[str, ...], **flags: Any) -> None:
    """Answer requests in OpenAI's and Anthropic's protocols."""
    own = {name: flags.pop(name) for name in ServerSettings.__dataclass_fields__ if name in flags}
    settings = chosen(ServerSettings, {**own, "api_key": own["api_key"] or os.environ.get(_KEY)})
    options, engine = options_and_settings(flags)
    if not models:
        click.echo("No --model given: using the bundled demo, a tiny model for trying things out.", err=True)
    try:
        from mlx_qwen.server.serve import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise PromptError("The server needs two packages more: pip install 'mlx-qwen[serve]'") from error
    ready = None
    if own_rank() is not None:
        if len(models) > 1:
            raise PromptError("Several Macs share one model at a time; expected one --model.")
        ready = load_here(models[0] if models else None, engine)
    serve(models, settings, options, engine, say=lambda line: click.echo(line, err=True), ready=ready)
