"""Shows an answer while it is being written."""

import sys

import click

from mlx_qwen.answer import ReasoningSplitter


class AnswerPrinter:
    """Prints text as it comes: reasoning dimmed on a terminal; raw, tags included, into files and pipes."""

    def __init__(self, *, inside_thinking: bool) -> None:
        self._splitter = ReasoningSplitter(inside=inside_thinking) if sys.stdout.isatty() else None
        self._reasoned = False

    def push(self, text: str) -> None:
        """Shows the next piece of raw text."""
        if self._splitter is None:
            click.echo(text, nl=False)
        else:
            self._show(*self._splitter.push(text))
        sys.stdout.flush()

    def finish(self) -> None:
        """Shows what is left and ends the line."""
        if self._splitter is not None:
            self._show(*self._splitter.finish())
        click.echo()

    def _show(self, reasoning: str, answer: str) -> None:
        if reasoning:
            self._reasoned = True
            click.secho(reasoning, dim=True, nl=False)
        if answer:
            click.echo(("\n\n" if self._reasoned else "") + answer, nl=False)
            self._reasoned = False
