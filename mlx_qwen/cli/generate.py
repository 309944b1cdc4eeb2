"""`mlx-qwen generate`: one prompt, one answer."""

import sys
from typing import Unpack

import click

from mlx_qwen.cli.options import chosen_model, generation_flags, model_flags
from mlx_qwen.options import OptionKeywords, options_and_settings


@click.command()
@model_flags
@click.option("-p", "--prompt", required=True, help="What to ask; - reads it from standard input.")
@generation_flags(max_tokens=2048)
@click.option("--ignore-chat-template", is_flag=True, help="Use the prompt as it stands.")
@click.option("--verbose/--quiet", default=True, help="Statistics after the answer.  [default: verbose]")
def command(
    model: str | None,
    revision: str | None,
    prompt: str,
    system_prompt: str | None,
    ignore_chat_template: bool,
    verbose: bool,
    **flags: Unpack[OptionKeywords],
) -> None:
    """Write an answer to one prompt."""
    path = chosen_model(model)
    if ignore_chat_template and system_prompt is not None:
        raise click.UsageError("--system-prompt needs the chat template; drop --ignore-chat-template.")
    text = sys.stdin.read() if prompt == "-" else prompt

    from mlx_qwen.cli.answering import answer_prompt
    from mlx_qwen.loading import load

    options, settings = options_and_settings({**flags, "progress": sys.stderr.isatty()})
    loaded, processor = load(path, revision=revision)
    plain = ignore_chat_template or processor.chat_template is None
    asked = text if plain else _messages(text, system_prompt)
    answer_prompt(loaded, processor, asked, options, settings, verbose=verbose)


def _messages(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]
