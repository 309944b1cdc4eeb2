"""`mlx-qwen generate`: one prompt, one answer."""

import sys
from typing import TYPE_CHECKING, Unpack

import click

from mlx_qwen.cli.options import chosen_model, generation_flags, model_flags
from mlx_qwen.cli.reading import read_prompt
from mlx_qwen.cli.several import load_here, refuse_prompt_cache, refuse_stdin
from mlx_qwen.cli.words import ManyValuesCommand
from mlx_qwen.keywords import OptionKeywords, options_and_settings

if TYPE_CHECKING:
    from mlx_qwen.prompt.inputs import Prompt


@click.command(cls=ManyValuesCommand)
@click.argument("question", required=False)
@model_flags
@click.option("-p", "--prompt", help="The question as a flag; - reads it from standard input.")
@click.option("--prompt-file", metavar="FILE", help="Read the question from a file; - for standard input.")
@generation_flags(max_tokens=2048)
@click.option("--ignore-chat-template", is_flag=True, help="Use the prompt as it stands.")
@click.option(
    "--prompt-cache-file", metavar="FILE", help="Go on with the text that `mlx-qwen cache-prompt` wrote to this file."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: the answer's parts, its end, usage, rates."
)
@click.option(
    "--verbose/--quiet", default=None, help="Statistics after the answer.  [default: verbose, with --json quiet]"
)
def command(
    question: str | None,
    model: str | None,
    revision: str | None,
    prompt: str | None,
    prompt_file: str | None,
    system_prompt: str | None,
    ignore_chat_template: bool,
    prompt_cache_file: str | None,
    as_json: bool,
    verbose: bool | None,
    **flags: Unpack[OptionKeywords],
) -> None:
    """Write an answer to one prompt.

    QUESTION, --prompt or --prompt-file gives the prompt; with none of them it is read from a pipe. An answer that
    --max-tokens cuts ends with exit code 0 like any other: stderr says so, and with --json its finish_reason, "length".
    """
    text = _prompt(question, prompt, prompt_file)
    if ignore_chat_template and system_prompt is not None:
        raise click.UsageError("--system-prompt needs the chat template; drop --ignore-chat-template.")
    if prompt_cache_file is not None and system_prompt is not None:
        raise click.UsageError("--system-prompt belongs to the cached text: give it to mlx-qwen cache-prompt.")
    if prompt_cache_file is not None:
        refuse_prompt_cache()
    path = chosen_model(model)

    from mlx_qwen.cli.answering import answer_prompt
    from mlx_qwen.cli.prompt_cache import rest
    from mlx_qwen.engine.state_files import load_prompt_cache

    options, settings = options_and_settings({**flags, "progress": sys.stderr.isatty()})
    loaded, processor = load_here(path, settings, revision=revision)
    plain = ignore_chat_template or processor.chat_template is None
    asked: Prompt = text if plain else _messages(text, system_prompt)
    cache = None if prompt_cache_file is None else load_prompt_cache(prompt_cache_file, loaded)
    if cache is not None and not plain:
        asked = rest(processor, text, options)
    told = not as_json if verbose is None else verbose
    answer_prompt(loaded, processor, asked, options, settings, verbose=told, as_json=as_json, cache=cache)


def _prompt(question: str | None, prompt: str | None, file: str | None) -> str:
    """The prompt, from the one place that gives it."""
    given = [one for one in (question, prompt, file) if one is not None]
    if len(given) > 1:
        raise click.UsageError(
            f"The prompt is given as {given[0]!r:.60} and as {given[1]!r:.60}; expected one of them."
        )
    if not given and sys.stdin.isatty():
        raise click.UsageError('There is no prompt; expected one like: mlx-qwen generate "What is 37+58?"')
    source = file if file is not None else "-" if given in ([], ["-"]) else None
    if source is None:
        return given[0]
    if source == "-":
        refuse_stdin()
    return read_prompt(source)


def _messages(text: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]
