"""The JSON between the tags of a block, while it is still arriving."""

from collections.abc import Callable

from mlx_qwen.answer.call_writer import CallWriter
from mlx_qwen.answer.json_arguments import JsonArguments
from mlx_qwen.answer.json_calls import JsonText
from mlx_qwen.answer.tags import Kind, Tag
from mlx_qwen.json_types import ToolCall


class JsonBlock:
    """Takes tags, and text between tags, until the JSON has ended, and tells the arguments that came meanwhile.

    `broken`: whether JSON of this text broke off before, so that its quotes tell less about what is a tag.
    """

    def __init__(self, writer: Callable[[str], CallWriter], *, broken: bool) -> None:
        self.tags: list[Tag] = []
        self.arguments = JsonArguments(writer)
        self._json = JsonText()
        self._broken = broken
        # In a string behind another block's opening tag: its place in `tags`, and how many strings came before.
        self._inner: tuple[int, int] | None = None

    def calls(self) -> list[ToolCall]:
        """The calls that the JSON holds; none where it is broken."""
        return self._json.calls()

    def another_block(self) -> list[Tag]:
        """What was taken from another block's opening tag on, if the string around that has not ended."""
        return [] if self._inner is None else self.tags[self._inner[0] :]

    def take(self, tag: Tag) -> list[Tag] | None:
        """Takes the next tag; what comes behind the JSON where it has ended, else None."""
        if self._ends_before(tag):
            return [tag]
        if tag.kind is Kind.OPEN_BLOCK and self._inner is None:
            self._inner = len(self.tags), self._json.strings
        self.tags.append(tag)
        rest = self._json.push(tag.raw)
        if rest is not None:
            self.tags[-1] = tag = Tag(Kind.TEXT, tag.raw.removesuffix(rest))
        self._follow(tag)
        if rest is None:
            return None
        return [Tag(Kind.TEXT, rest)] if rest else []

    def _ends_before(self, tag: Tag) -> bool:
        """No tag stands outside of strings; in one, the block's end on a new line shows that a quote is missing."""
        if tag.kind is Kind.TEXT or not self._json.in_string:
            return tag.kind is not Kind.TEXT
        if self._broken:
            return tag.kind in (Kind.CLOSE_BLOCK, Kind.OPEN_BLOCK)
        return tag.kind is Kind.CLOSE_BLOCK and tag.on_new_line

    def _follow(self, tag: Tag) -> None:
        """Tells the arguments that came; from another block's tag on only when the string around it has ended."""
        if self._inner is None:
            self.arguments.push(tag.raw)
        elif self._json.strings > self._inner[1]:
            for one in self.tags[self._inner[0] :]:
                self.arguments.push(one.raw)
            self._inner = None
