"""Flags that `generate` and `chat` share, named as mlx-lm and mlx-vlm name them."""

from collections.abc import Callable
from typing import TypedDict

import click

Flag = Callable[[Callable[..., None]], Callable[..., None]]


class GenerationFlags(TypedDict):
    """The flags that become `GenerationOptions`, under the same names."""

    max_tokens: int
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    seed: int | None
    enable_thinking: bool | None
    thinking_budget: int | None
    stop: tuple[str, ...]
    kv_bits: int | None
    prefill_step_size: int
    max_pixels: int | None
    min_pixels: int | None
    total_pixels: int | None
    fps: float | None
    min_frames: int | None
    max_frames: int | None


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
    return _with(flags, function)


def generation_flags(*, max_tokens: int) -> Flag:
    """Adds the flags of GenerationFlags.

    Sampling flags that are not given take Qwen's recommendation, those on images and videos the model's own settings.
    """
    flags: list[Flag] = [
        click.option("--system-prompt", help="System message."),
        click.option("-m", "--max-tokens", type=int, default=max_tokens, show_default=True, help="Most tokens."),
        click.option("--temp", "--temperature", "temperature", type=float, help="Temperature; 0 is greedy."),
        click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability; 1 is off."),
        click.option("--top-k", type=int, help="Keep this many of the likeliest tokens; 0 is off."),
        click.option("--min-p", type=float, help="Keep tokens this likely relative to the likeliest; 0 is off."),
        click.option("--presence-penalty", type=float, help="Subtracted from logits of tokens in the answer."),
        click.option("--repetition-penalty", type=float, help="Shrinks logits of tokens seen before; 1 is off."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--enable-thinking/--no-thinking", default=None, help="Reason first, or answer at once."),
        click.option("--thinking-budget", type=int, help="Most tokens of reasoning before the answer."),
        click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated."),
        click.option("--kv-bits", type=int, help="Pack keys and values to 8 or 4 bits."),
        click.option("--prefill-step-size", type=int, default=2048, show_default=True, help="Prompt tokens at once."),
        click.option("--max-pixels", type=int, help="Shrink larger images and frames of videos to this area."),
        click.option("--min-pixels", type=int, help="Enlarge smaller images and frames of videos to this area."),
        click.option("--total-pixels", type=int, help="Area of all frames of a video together."),
        click.option("--fps", type=float, help="Frames taken from a second of video."),
        click.option("--min-frames", type=int, help="Fewest frames taken from a video that has as many."),
        click.option("--max-frames", type=int, help="Most frames taken from a video."),
    ]
    return lambda function: _with(flags, function)


def chosen_model(model: str | None) -> str | None:
    """The --model flag; without it None, the bundled demo, and a word on stderr that it is used."""
    if model is None:
        click.echo("No --model given: using the bundled demo, a tiny model for trying things out.", err=True)
    return model


def _with(flags: list[Flag], function: Callable[..., None]) -> Callable[..., None]:
    for flag in reversed(flags):
        function = flag(function)
    return function
