"""Runs one prompt for the command line, on the same path as the Python functions."""

import json

import click

from mlx_qwen.answer.deltas import AnswerDelta
from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.cli.printer import AnswerPrinter
from mlx_qwen.engine.caching import kv_cache_summary
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import Prompt, prompt_inputs
from mlx_qwen.prompt.placed import describe
from mlx_qwen.requests import stream_answer
from mlx_qwen.settings import EngineSettings


def answer_prompt(
    model: Model,
    processor: Processor,
    prompt: Prompt,
    options: GenerationOptions,
    settings: EngineSettings,
    *,
    verbose: bool,
    as_json: bool = False,
    cache: HybridCache | None = None,
) -> None:
    """Prints the answer to a prompt that goes on after `cache`, as it comes, or `as_json` once it is there.

    One that is cut short by Ctrl-C is printed too.

    If `verbose`, stderr says before it what the images and videos became, and after it statistics.
    """
    inputs = prompt_inputs(processor, prompt, options)
    responses = stream_answer(model, processor, inputs, options, settings, cache)
    for one in inputs.media if verbose else ():
        click.echo(describe(processor, one.patches), err=True)
    if verbose and settings.kv_bits is not None:
        click.echo(kv_cache_summary(model, settings.kv_bits), err=True)
    printer = JsonPrinter() if as_json else AnswerPrinter()
    last = None
    try:
        for last in responses:
            printer.push(last)
    finally:
        printer.finish(quiet=not verbose)
        if verbose and last is not None:
            click.echo(f"{'=' * 10}\n{last.statistics()}", err=True)


class JsonPrinter:
    """Prints an answer as one JSON object when it has ended; of one that was interrupted, what had come."""

    def __init__(self) -> None:
        self._deltas: list[AnswerDelta] = []
        self._last: GenerationResponse | None = None

    def push(self, response: GenerationResponse) -> None:
        """Takes what a response adds."""
        self._last = response
        self._deltas.append(response.delta)

    def finish(self, *, quiet: bool = False, stopped: bool = False) -> None:
        """Prints the object; its `finish_reason` says by which end, so that `quiet` and `stopped` change nothing."""
        last = self._last
        if last is None:
            return
        content, reasoning = ("".join(getattr(one, part) for one in self._deltas) for part in ("content", "reasoning"))
        message = last.answer.message if last.answer else {"content": content, "reasoning_content": reasoning or None}
        read = last.prompt_tokens + last.cached_tokens
        shown = {
            "text": "".join(one.text for one in self._deltas),
            "content": message["content"],
            "reasoning": message.get("reasoning_content"),
            "tool_calls": message.get("tool_calls", []),
            "finish_reason": last.finish_reason,
            "usage": {
                "prompt_tokens": read,
                "cached_tokens": last.cached_tokens,
                "completion_tokens": last.generation_tokens,
                "total_tokens": read + last.generation_tokens,
            },
            "rates": {"prompt_tps": last.prompt_tps, "generation_tps": last.generation_tps},
        }
        click.echo(json.dumps(shown, ensure_ascii=False))
