"""`mlx-qwen generate`: one prompt, one answer."""

import sys
from dataclasses import replace
from typing import Unpack

import click

from mlx_qwen.cli.options import GenerationFlags, chosen_model, generation_flags, model_flags


@click.command()
@model_flags
@click.option("-p", "--prompt", required=True, help="What to ask; - reads it from standard input.")
@click.option("--image", "images", multiple=True, metavar="PATH|URL", help="Image to ask about; may be repeated.")
@click.option(
    "--video", "videos", multiple=True, metavar="PATH|URL", help="Video, placed behind all images; may be repeated."
)
@generation_flags(max_tokens=2048)
@click.option("--ignore-chat-template", is_flag=True, help="Use the prompt as it stands.")
@click.option("--verbose/--quiet", default=True, help="Statistics after the answer.  [default: verbose]")
def command(
    model: str | None,
    revision: str | None,
    prompt: str,
    images: tuple[str, ...],
    videos: tuple[str, ...],
    system_prompt: str | None,
    ignore_chat_template: bool,
    verbose: bool,
    **flags: Unpack[GenerationFlags],
) -> None:
    """Write an answer to one prompt."""
    path = chosen_model(model)
    if ignore_chat_template and system_prompt is not None:
        raise click.UsageError("--system-prompt needs the chat template; drop --ignore-chat-template.")
    text = sys.stdin.read() if prompt == "-" else prompt

    from mlx_qwen.cli.answering import answer_prompt, options_from_flags
    from mlx_qwen.loading import load

    options = replace(options_from_flags(flags), images=images, videos=videos)
    loaded, processor = load(path, revision=revision)
    plain = ignore_chat_template or processor.chat_template is None
    answer_prompt(loaded, processor, text if plain else _messages(text, system_prompt), options, verbose=verbose)


def _messages(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]
