"""Finds where the value of a parameter ends.

A value may itself hold closing tags, or a whole sample call, and a model may forget tags. So text streams on up to the
first tag that could end the value; from there everything is held until what follows decides: the format going on behind
a closing tag ends the value there; a call inside must come to its own end first; and when the next call begins, or the
text ends, with no proper end in between, the value ended where the holding began.
"""

from collections.abc import Callable
from typing import NamedTuple

from mlx_qwen.answer.tags import Kind, Tag

# A call in a call in a call is no sample any more but calls that were not closed. Bounds the work: text is read again
# at most once for each level.
_DEEPEST = 3


class Verdict(NamedTuple):
    """`value` belongs to the value, which has `ended` or not; the tags of `rest` are to be taken after it."""

    value: str
    rest: list[Tag]
    ended: bool = False
    loose: bool = False


class OpenValue:
    """The value of one parameter, from behind its opening tag.

    `is_parameter` and `is_tool` say which names in tags are real.
    """

    def __init__(self, *, is_parameter: Callable[[str], bool], is_tool: Callable[[str], bool]) -> None:
        self._is_parameter = is_parameter
        self._is_tool = is_tool
        self._inline: bool | None = None
        self._held: list[Tag] = []
        self._opener: int | None = None
        # At the value's own level: the closing tag that may be its end, and whether `</function>` came behind it;
        # whether the call closed without one.
        self._closing: int | None = None
        self._behind_function = False
        self._over = False
        # Sample calls: how many are open, whether one's parameter is, where that was closed, and the same for the first
        # whole end in a sample of a function that no tool has.
        self._level = 0
        self._in_sample_value = False
        self._sample_closing: int | None = None
        self._left_sample = False
        self._foreign = False
        self._foreign_end: int | None = None

    def take(self, tag: Tag) -> Verdict | None:
        """Takes the next tag or text; None while it is undecided."""
        if not self._held and not self._could_end(tag):
            if self._inline is None:
                self._inline = not tag.raw.startswith("\n")
            return Verdict(tag.raw, [])
        self._held.append(tag)
        return None if tag.blank else self._judge(len(self._held) - 1, tag)

    def finish(self, *, ended: bool) -> Verdict | None:
        """The verdict at the end of the text; None when the value is still open there.

        `ended`: whether the model ended the text itself.
        """
        if not self._held:
            return None
        if self._closing is not None and not self._level:
            return self._end(self._closing)
        if self._foreign and self._foreign_end is not None:
            return self._end(self._foreign_end)
        last = next((tag for tag in reversed(self._held) if not tag.blank), None)
        complete = last is not None and last.kind in (Kind.CLOSE_BLOCK, Kind.CLOSE_FUNCTION)
        return self._end(0, loose=True) if ended or complete else None

    @property
    def held(self) -> str:
        """The text that is undecided."""
        return "".join(tag.raw for tag in self._held)

    def _could_end(self, tag: Tag) -> bool:
        if tag.kind is Kind.PARAMETER:
            return self._is_next_parameter(tag)
        return self._is_header(tag) if tag.kind is Kind.FUNCTION else tag.kind is not Kind.TEXT

    def _is_next_parameter(self, tag: Tag) -> bool:
        """Without a closing tag before it, a parameter begins on a line of its own."""
        return (tag.on_new_line or self._inline is not False) and self._is_parameter(tag.name)

    def _is_header(self, tag: Tag) -> bool:
        return tag.on_new_line and self._is_tool(tag.name)

    def _end(self, index: int, *, loose: bool = False) -> Verdict:
        value = "".join(tag.raw for tag in self._held[:index])
        return Verdict(value, self._held[index:], ended=True, loose=loose)

    def _judge(self, index: int, tag: Tag) -> Verdict | None:
        if self._opener is not None:
            opener, self._opener = self._opener, None
            if tag.kind is Kind.FUNCTION or (tag.kind is Kind.TEXT and tag.raw.lstrip().startswith("{")):
                return self._header(opener, tag)
            if opener == 0:  # the tag was only mentioned
                held, self._held = self._held, []
                return Verdict("".join(one.raw for one in held[:-1]), [tag])
            self._over = self._over or self._behind_function
            self._closing, self._behind_function = None, False
        if tag.kind is Kind.OPEN_BLOCK:
            self._opener = index
            return None
        if self._left_sample and tag.kind is Kind.CLOSE_BLOCK:
            self._left_sample = False
            self._note_foreign_end()
            return None
        left, self._left_sample = self._left_sample, False
        if left and tag.kind is Kind.FUNCTION:
            return self._header(index, tag)
        return self._inside_sample(index, tag) if self._level else self._outside_sample(index, tag)

    def _header(self, index: int, tag: Tag) -> Verdict | None:
        """A call begins: the next one, or a sample inside of the value."""
        if self._closing is not None:
            return self._end(self._closing)
        if self._over or self._level == _DEEPEST:
            return self._end(0, loose=True)
        self._level += 1
        self._in_sample_value, self._sample_closing = False, None
        if index == 0:
            self._foreign = tag.kind is Kind.FUNCTION and not self._is_tool(tag.name)
        return None

    def _outside_sample(self, index: int, tag: Tag) -> Verdict | None:
        kind = tag.kind
        if self._closing is not None and kind is not Kind.CLOSE_PARAMETER:
            next_function = kind is Kind.FUNCTION and (self._behind_function or self._is_tool(tag.name))
            next_parameter = kind is Kind.PARAMETER and not self._behind_function and self._is_parameter(tag.name)
            if kind is Kind.CLOSE_BLOCK or next_function or next_parameter:
                return self._end(self._closing)
            if kind is Kind.CLOSE_FUNCTION:
                self._behind_function = True
                return None
            self._over = self._over or self._behind_function
            self._closing = None
        if kind is Kind.CLOSE_PARAMETER:
            if self._closing is None or self._behind_function:
                self._closing, self._behind_function = index, False
        elif kind in (Kind.CLOSE_FUNCTION, Kind.CLOSE_BLOCK):
            self._over = True
        elif kind is Kind.FUNCTION and self._is_header(tag):
            return self._header(index, tag)
        elif kind is Kind.PARAMETER and self._is_next_parameter(tag):
            return self._end(0, loose=True)
        return None

    def _inside_sample(self, index: int, tag: Tag) -> Verdict | None:
        kind = tag.kind
        if kind is Kind.FUNCTION and self._is_header(tag):
            return self._header(index, tag)
        if kind is Kind.PARAMETER:
            self._in_sample_value = True
        elif kind is Kind.CLOSE_PARAMETER and self._in_sample_value:
            self._in_sample_value, self._sample_closing = False, index
            return None
        elif kind is Kind.CLOSE_PARAMETER and self._sample_closing is None:
            # Nothing is open in the sample: it was a beginning only, and this closes the value around it.
            self._level, self._closing, self._behind_function = 0, index, False
        elif kind in (Kind.CLOSE_FUNCTION, Kind.CLOSE_BLOCK):
            self._level -= 1
            self._in_sample_value = self._level > 0
            self._left_sample = kind is Kind.CLOSE_FUNCTION
            if kind is Kind.CLOSE_BLOCK:
                self._note_foreign_end()
            return None
        self._sample_closing = None
        return None

    def _note_foreign_end(self) -> None:
        if self._foreign_end is None:
            self._foreign_end = self._sample_closing
        self._sample_closing = None
