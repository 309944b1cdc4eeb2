"""Shows an answer while it is being written."""

import sys

import click

from mlx_qwen.answer.response import GenerationResponse


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
            self._show(response)
        else:
            click.echo(response.text, nl=False)
        sys.stdout.flush()

    def finish(self, *, quiet: bool = False) -> None:
        """Ends the line; says on stderr when the limit of tokens cut the answer, unless `quiet`."""
        click.echo()
        if not quiet and self._last is not None and self._last.finish_reason == "length":
            tokens = self._last.generation_tokens
            click.echo(f"The answer was cut at {tokens:,} tokens; --max-tokens allows more.", err=True)

    def _show(self, response: GenerationResponse) -> None:
        delta = response.delta
        if delta.reasoning:
            self._begin("reasoning")
            click.secho(delta.reasoning, dim=True, nl=False)
        if delta.content:
            self._begin("content")
            click.echo(delta.content, nl=False)
        for call in delta.tool_calls:
            if call.name is not None:
                self._begin(f"call {call.index}")
                click.secho(f"{call.name} ", bold=True, nl=False)
            click.echo(call.arguments, nl=False)

    def _begin(self, part: str) -> None:
        """Two different parts stand apart."""
        if self._part not in ("", part):
            click.echo("\n")
        self._part = part
