"""`mlx-qwen cache-prompt`: read a long prompt once, for many questions about it."""

import sys

import click

from mlx_qwen.cli.options import chosen_model, model_flags
from mlx_qwen.cli.reading import read_prompt
from mlx_qwen.options import GenerationOptions
from mlx_qwen.settings import EngineSettings


@click.command()
@model_flags
@click.option("-p", "--prompt", help="The text as a flag; - reads it from standard input.")
@click.option("--prompt-file", metavar="FILE", help="Read the text from a file; - for standard input.")
@click.option("--prompt-cache-file", metavar="FILE", required=True, help="The file that is written, *.safetensors.")
@click.option("--system-prompt", help="System message.")
@click.option("--kv-bits", type=click.Choice(["4", "8"]), help="Bits of keys and values of the attention layers.")
def command(
    model: str | None,
    revision: str | None,
    prompt: str | None,
    prompt_file: str | None,
    prompt_cache_file: str,
    system_prompt: str | None,
    kv_bits: str | None,
) -> None:
    """Read a text once, and keep what the model remembers of it in a file.

    The text becomes the beginning of a user's message; `mlx-qwen generate --prompt-cache-file FILE QUESTION` goes on
    with it, as often as you like, without reading it again.
    """
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("Expected the text once: with --prompt or with --prompt-file.")
    text = read_prompt(prompt_file or "-") if prompt in (None, "-") else prompt
    path = chosen_model(model)

    from mlx_qwen.cli.prompt_cache import beginning
    from mlx_qwen.engine.state_files import save_prompt_cache
    from mlx_qwen.loading import load
    from mlx_qwen.requests import stream_answer

    loaded, processor = load(path, revision=revision)
    cache = loaded.make_cache(kv_bits=None if kv_bits is None else int(kv_bits))
    settings = EngineSettings(progress=sys.stderr.isatty())
    options = GenerationOptions(max_tokens=1, temperature=0)
    ids = beginning(processor, text or "", system_prompt, options)
    for _ in stream_answer(loaded, processor, ids, options, settings, cache):
        pass
    save_prompt_cache(prompt_cache_file, cache)
    click.echo(f"{prompt_cache_file} holds {cache.offset:,} tokens.", err=True)
