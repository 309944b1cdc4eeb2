"""Shows an answer while it is being written."""

import sys

import click

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.answer.response import GenerationResponse

# Codes that move the cursor or change the terminal, which a model has no business with.
_CONTROLS = {code: None for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A model's text without what would control a terminal."""
    return text.translate(_CONTROLS)


class AnswerPrinter:
    """Prints an answer as it comes: on a terminal reasoning dimmed and calls by name; raw, tags included, elsewhere."""

    def __init__(self) -> None:
        self._watched = sys.stdout.isatty()
        self._part = ""
        self._last: GenerationResponse | None = None

    def push(self, response: GenerationResponse) -> None:
        """Shows what a response adds."""
        self._last = response
        if self._watched:
            self._show(response.delta)
        else:
            click.echo(response.text, nl=False)
        sys.stdout.flush()

    def finish(self, *, quiet: bool = False, stopped: bool = False) -> None:
        """Ends the line; says that the answer was stopped, or on stderr, unless `quiet`, that the limit cut it."""
        click.echo(" (stopped)" if stopped else "")
        self._say_if_cut(quiet=quiet)

    def _say_if_cut(self, *, quiet: bool) -> None:
        if not quiet and self._last is not None and self._last.finish_reason == "length":
            tokens = self._last.generation_tokens
            click.echo(f"The answer was cut at {tokens:,} tokens; --max-tokens allows more.", err=True)

    def _show(self, delta: AnswerDelta) -> None:
        if delta.reasoning:
            self._begin("reasoning")
            click.secho(printable(delta.reasoning), dim=True, nl=False)
        if delta.content:
            self._begin("content")
            click.echo(printable(delta.content), nl=False)
        for call in delta.tool_calls:
            if call.name is not None:
                self._begin(f"call {call.index}")
                click.secho(f"{printable(call.name)} ", bold=True, nl=False)
            click.echo(printable(call.arguments), nl=False)

    def _begin(self, part: str) -> None:
        """Two different parts stand apart."""
        if self._part not in ("", part):
            click.echo("\n")
        self._part = part
