"""What a benchmark prints: a title, a header and rows of text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """One benchmark's result; `note` says what was measured."""

    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """Markdown, its columns aligned so that it reads well in a terminal too."""
        lines = [list(self.header), *(list(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        texts = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        rule = "-|-".join("-" * width for width in widths)
        head, *body = (f"| {text} |" for text in texts)
        return "\n".join([f"### {self.title}", "", self.note, "", head, f"|-{rule}-|", *body, ""])
