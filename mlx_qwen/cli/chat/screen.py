"""An answer on a terminal: reasoning dimmed or folded to a line, Markdown, calls by name."""

import sys
from time import perf_counter

import click

from mlx_qwen.answer import AnswerDelta
from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.cli.chat.markdown import MarkdownStream
from mlx_qwen.cli.printer import AnswerPrinter, printable
from mlx_qwen.status_line import StatusLine


class AnswerScreen(AnswerPrinter):
    """Shows an answer as it comes; with `folded`, one line stands for its reasoning."""

    def __init__(self, *, folded: bool) -> None:
        super().__init__()
        self._folded = folded
        self._markdown = MarkdownStream()
        self._status = StatusLine(sys.stdout)
        self._begun = perf_counter()
        self._thought = 0
        self._arguments: dict[int, str] = {}

    def push(self, response: GenerationResponse) -> None:
        """Shows what a response adds."""
        self._last = response
        self._show(response.delta)
        sys.stdout.flush()

    def finish(self, *, quiet: bool = False, stopped: bool = False) -> None:
        """Draws what is left; says that the answer was stopped, or, unless `quiet`, that the limit of tokens cut it."""
        self._begin("")
        if stopped:
            click.secho("(stopped)", dim=True)
        self._say_if_cut(quiet=quiet)

    def _show(self, delta: AnswerDelta) -> None:
        if delta.reasoning:
            self._begin("reasoning")
            self._think(printable(delta.reasoning))
        if delta.content:
            self._begin("content")
            self._markdown.push(printable(delta.content))
        for call in delta.tool_calls:
            self._begin(f"call {call.index}")
            click.secho(f"{printable(call.name)} " if call.name else "", bold=True, nl=False)
            click.echo(printable(call.arguments), nl=False)

    def _think(self, text: str) -> None:
        self._thought += 1
        if self._folded:
            self._status.show(self._summary("Thinking"))
        else:
            click.secho(text, dim=True, nl=False)

    def _begin(self, part: str) -> None:
        """Two different parts stand apart."""
        if part == self._part:
            return
        if self._part == "content":
            self._markdown.finish()
        elif self._part == "reasoning" and self._folded:
            self._status.finish(keep=False)
            click.secho(f"{self._summary('Thought')}; /fold shows it", dim=True)
        elif self._part:
            click.echo()
        if self._part and part:
            click.echo()
        self._part = part

    def _summary(self, word: str) -> str:
        return click.style(f"{word} for {perf_counter() - self._begun:.0f} s, {self._thought:,} tokens", dim=True)
