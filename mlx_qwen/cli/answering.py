"""Runs one prompt for the command line, on the same path as the Python functions."""

import click

from mlx_qwen.cli.printer import AnswerPrinter
from mlx_qwen.engine.caching import kv_cache_summary
from mlx_qwen.model import Model
from mlx_qwen.options import EngineSettings, GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, prompt_inputs
from mlx_qwen.prompt.placed import describe
from mlx_qwen.requests import stream_answer


def answer_prompt(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    options: GenerationOptions,
    settings: EngineSettings,
    *,
    verbose: bool,
) -> None:
    """Prints the answer as it comes.

    If `verbose`, stderr says before it what the images and videos became, and after it statistics, also for an answer
    cut short by Ctrl-C.
    """
    inputs = prompt_inputs(processor, prompt, options)
    responses = stream_answer(model, processor, inputs, options, settings)
    for one in inputs.media if verbose else ():
        click.echo(describe(processor, one.patches), err=True)
    if verbose and settings.kv_bits is not None:
        click.echo(kv_cache_summary(model, settings.kv_bits), err=True)
    printer = AnswerPrinter()
    last = None
    try:
        for last in responses:
            printer.push(last)
    finally:
        printer.finish(quiet=not verbose)
        if verbose and last is not None:
            click.echo(f"{'=' * 10}\n{last.statistics()}", err=True)
