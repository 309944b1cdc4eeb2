"""Markdown on a terminal while it is being written: finished blocks stay, only the growing one is drawn again."""

import sys
from collections.abc import Callable
from io import StringIO
from time import perf_counter
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax

_SECONDS_BETWEEN_DRAWINGS = 0.08
# Drawing takes no larger share of the time than one in this many, however long a block grows.
_LEAST_SHARE = 8


class MarkdownStream:
    """Takes Markdown in pieces, cut anywhere, and draws it as it grows.

    A block that is followed by another one is written for good. Of the last one, which may still change, lines that
    are out of the cursor's reach stay, and those that changed are replaced. The cursor stands below what is drawn.

    Args:
        stream: the terminal.
        clock: seconds that pass, as `time.perf_counter`.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = perf_counter) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._text = ""
        self._drawn: list[str] = []
        self._gone = 0
        self._due = 0.0

    def push(self, text: str) -> None:
        """Takes the next piece and draws, unless that was done just now."""
        self._text += text
        start = self._clock()
        if start >= self._due:
            self._draw()
            end = self._clock()
            self._due = end + max(_SECONDS_BETWEEN_DRAWINGS, (end - start) * _LEAST_SHARE)

    def finish(self) -> None:
        """Draws what is left, for good."""
        self._draw()
        self._text, self._drawn, self._gone = "", [], 0

    def _draw(self) -> None:
        finished = _finished(self._text)
        if finished:
            self._show([*rendered(self._text[:finished], self._console()), ""])
            self._text, self._drawn, self._gone = self._text[finished:], [], 0
        self._show(rendered(self._text, self._console()))

    def _show(self, lines: list[str]) -> None:
        """Put the lines of the last block in the place of those that were drawn of it."""
        lines = lines[self._gone :]
        same = next((i for i, pair in enumerate(zip(lines, self._drawn, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(lines), len(self._drawn)) if same is None else same
        up = len(self._drawn) - same
        self._stream.write((f"\x1b[{up}A\x1b[J" if up else "") + "".join(f"{line}\n" for line in lines[same:]))
        self._stream.flush()
        out_of_reach = max(0, len(lines) - max(self._console().height - 1, 1))
        self._gone += out_of_reach
        self._drawn = lines[out_of_reach:]

    def _console(self) -> Console:
        return Console(file=self._stream, highlight=False)


def rendered(text: str, console: Console) -> list[str]:
    """Markdown as lines for this terminal, with its codes for styles."""
    options = console.options
    paper = Console(
        file=StringIO(),
        width=options.max_width,
        force_terminal=True,
        color_system=console.color_system,  # type: ignore[arg-type]
        no_color=console.no_color,
        legacy_windows=False,
        highlight=False,
    )
    with paper.capture() as captured:
        paper.print(_Answer(text))
    lines = [line.rstrip(" ") for line in captured.get().split("\n")]
    inside = [index for index, line in enumerate(lines) if line]
    return lines[inside[0] : inside[-1] + 1] if inside else []


def _finished(text: str) -> int:
    """How much of a text is blocks that cannot change any more.

    A line that has not ended may yet belong to another block than it seems to, and does not count.
    """
    lines = text.split("\n")[:-1]
    blocks = [token for token in _parser().parse("\n".join(lines)) if token.level == 0 and token.map]
    if len(blocks) < 2 or blocks[-1].map is None:
        return 0
    return sum(len(line) + 1 for line in lines[: blocks[-1].map[0]])


def _parser() -> MarkdownIt:
    """CommonMark with tables; tags are text like any other, as a terminal has no use for them."""
    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")


class _Heading(Heading):
    LEVEL_ALIGN = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Code(CodeBlock):
    """Code in the terminal's own colours and nothing around it, so that it is copied as it is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip("\n")
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")


class _Answer(Markdown):
    """Markdown as models write it: a line that ends is a line that ends."""

    elements: ClassVar = {**Markdown.elements, "heading_open": _Heading, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup, self.parsed = text, _parser().parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
