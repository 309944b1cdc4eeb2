"""Separates the reasoning before `</think>` from the answer after it, while the text is still arriving."""

import re
from enum import Enum, auto
from typing import NamedTuple

from mlx_qwen.answer.tags import partial_tag_length

THINK_START = "<think>"
THINK_END = "</think>"

# A tool call in the block: a sample, or the real one where the block never closes. The end of the reasoning tells.
_CALL = r"<tool_call>\s{0,16}"
_END_OR_CALL = re.compile(rf"{THINK_END}|{_CALL}(?:<function=|\{{)")
_MAY_BECOME_A_CALL = re.compile(
    _CALL + "(?:" + "|".join("<function="[:length] for length in range(10, 0, -1)) + r"|)\Z"
)
_MOST_BLANKS = 1024


class Piece(NamedTuple):
    """New text, sorted into what is reasoning and what is answer."""

    reasoning: str
    answer: str


class _State(Enum):
    UNDECIDED = auto()
    REASONING = auto()
    CALL = auto()
    BEFORE_ANSWER = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Sorts raw model text. The tags, and the line breaks next to them, belong to neither side.

    `inside`: whether the prompt already opened the block, as Qwen3.5's does with thinking on. Otherwise a block counts
    only at the very start of the text. A tool call in a block that never closes belongs to the answer.
    `closed`: whether a block was there and has ended.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state = _State.REASONING if inside else _State.UNDECIDED
        self._buffer = ""
        self._breaks = 0
        self._begun = False
        self._call: list[str] = []
        self.closed = False

    def push(self, text: str) -> Piece:
        """Takes the next piece of raw text, cut anywhere, and returns what is certain by now."""
        self._buffer += text
        if self._state is _State.UNDECIDED:
            self._decide()
        reasoning = self._take_reasoning() if self._state is _State.REASONING else ""
        if self._state is _State.CALL:
            reasoning += self._take_call()
        return Piece(reasoning, self._take_answer())

    def finish(self, *, ended: bool = True) -> Piece:
        """What was held back because a tag might have followed.

        `ended`: whether the model ended the text itself. Where it was cut, and reasoning already went on after a call
        in the block, that call is none.
        """
        held, self._buffer = self._buffer, ""
        if self._state is _State.REASONING:
            return Piece(self._reasoning(held), "")
        if self._state is _State.CALL:
            text = "".join([*self._call, held])
            if ended or text.rstrip().endswith("</tool_call>"):
                return Piece("", text)
            return Piece(self._reasoning(text), "")
        return Piece("", held if self._state is not _State.BEFORE_ANSWER else "")

    def _decide(self) -> None:
        start = self._buffer.lstrip()
        if start.startswith(THINK_START):
            self._state, self._buffer = _State.REASONING, start[len(THINK_START) :]
        elif not THINK_START.startswith(start) or len(self._buffer) > _MOST_BLANKS:
            self._state = _State.ANSWER

    def _take_reasoning(self) -> str:
        found = _END_OR_CALL.search(self._buffer)
        if found is None:
            partial = _MAY_BECOME_A_CALL.search(self._buffer)
            tags = (THINK_END, "<tool_call>")
            end = partial.start() if partial else len(self._buffer) - partial_tag_length(self._buffer, tags)
            block, self._buffer = self._buffer[:end], self._buffer[end:]
            return self._reasoning(block)
        block = self._buffer[: found.start()]
        if found[0] == THINK_END:
            self._close(self._buffer[found.end() :])
            return self._reasoning(block)
        self._state, self._buffer = _State.CALL, self._buffer[found.start() :]
        return self._reasoning(block)

    def _take_call(self) -> str:
        block, closed, rest = self._buffer.partition(THINK_END)
        if closed:
            self._close(rest)
            return self._reasoning("".join([*self._call, block]))
        end = len(block) - partial_tag_length(block, (THINK_END,))
        self._call.append(block[:end])
        self._buffer = block[end:]
        return ""

    def _close(self, rest: str) -> None:
        self._state, self._buffer, self.closed = _State.BEFORE_ANSWER, rest, True

    def _reasoning(self, text: str) -> str:
        """`text` without the line breaks that begin the block; those that may end it are only counted."""
        shown = text.rstrip("\n")
        breaks, self._breaks = self._breaks, len(text) - len(shown)
        if not shown:
            self._breaks += breaks
            return ""
        before = "\n" * breaks if self._begun else ""
        shown = before + (shown if self._begun else shown.lstrip("\n"))
        self._begun = True
        return shown

    def _take_answer(self) -> str:
        if self._state is _State.BEFORE_ANSWER:
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = _State.ANSWER
        if self._state is not _State.ANSWER:
            return ""
        answer, self._buffer = self._buffer, ""
        return answer


class ReasoningEnd:
    """Finds where the reasoning ends in raw text, without holding any of it back."""

    def __init__(self, *, inside: bool) -> None:
        self._state = _State.REASONING if inside else _State.UNDECIDED
        self._tail = ""

    def push(self, text: str) -> tuple[str, str]:
        """The next piece, cut in two: what still belongs to the reasoning, its last tag included, and what does not."""
        if self._state is _State.UNDECIDED:
            text, self._tail = self._tail + text, ""
            start = text.lstrip()
            if start.startswith(THINK_START):
                self._state = _State.REASONING
            elif THINK_START.startswith(start) and len(text) <= _MOST_BLANKS:
                self._tail = text
                return "", ""
            else:
                self._state = _State.ANSWER
        if self._state is not _State.REASONING:
            return "", text
        seen = self._tail + text
        end = seen.find(THINK_END)
        if end < 0:
            self._tail = seen[-len(THINK_END) + 1 :]
            return text, ""
        self._state = _State.ANSWER
        end += len(THINK_END) - len(self._tail)
        self._tail = ""
        return text[:end], text[end:]

    def finish(self) -> str:
        """The little that was held back because a block might have begun with it."""
        return self._tail if self._state is _State.UNDECIDED else ""
