"""Separates the reasoning before `</think>` from the answer after it, while the text is still arriving."""

from enum import Enum, auto
from typing import NamedTuple

from mlx_qwen.answer.tags import partial_tag_length

THINK_START = "<think>"
THINK_END = "</think>"


class Piece(NamedTuple):
    """New text, sorted into what is reasoning and what is answer."""

    reasoning: str
    answer: str


class _State(Enum):
    UNDECIDED = auto()
    REASONING = auto()
    BEFORE_ANSWER = auto()
    ANSWER = auto()


class ReasoningSplitter:
    """Sorts raw model text. The tags, and the line breaks next to them, belong to neither side.

    `inside`: whether the prompt already opened the block, as Qwen3.5's does with thinking on. Otherwise a block counts
    only at the very start of the text.
    """

    def __init__(self, *, inside: bool) -> None:
        self._state = _State.REASONING if inside else _State.UNDECIDED
        self._buffer = ""
        self._reasoning_begun = False

    def push(self, text: str) -> Piece:
        """Takes the next piece of raw text, cut anywhere, and returns what is certain by now."""
        self._buffer += text
        if self._state is _State.UNDECIDED:
            self._decide()
        reasoning = self._take_reasoning() if self._state is _State.REASONING else ""
        return Piece(reasoning, self._take_answer())

    def finish(self) -> Piece:
        """What was held back because a tag might have followed."""
        held, self._buffer = self._buffer, ""
        if self._state is _State.REASONING:
            return Piece(self._without_leading_breaks(held.rstrip("\n")), "")
        return Piece("", held if self._state is not _State.BEFORE_ANSWER else "")

    def _decide(self) -> None:
        start = self._buffer.lstrip()
        if start.startswith(THINK_START):
            self._state, self._buffer = _State.REASONING, start[len(THINK_START) :]
        elif not THINK_START.startswith(start):
            self._state = _State.ANSWER

    def _take_reasoning(self) -> str:
        block, closed, rest = self._buffer.partition(THINK_END)
        if closed:
            self._state, self._buffer = _State.BEFORE_ANSWER, rest
            return self._without_leading_breaks(block.rstrip("\n"))
        certain = block[: len(block) - partial_tag_length(block, (THINK_END,))].rstrip("\n")
        self._buffer = block[len(certain) :]
        return self._without_leading_breaks(certain)

    def _without_leading_breaks(self, text: str) -> str:
        if not self._reasoning_begun:
            text = text.lstrip("\n")
            self._reasoning_begun = bool(text)
        return text

    def _take_answer(self) -> str:
        if self._state is _State.BEFORE_ANSWER:
            self._buffer = self._buffer.lstrip("\n")
            if self._buffer:
                self._state = _State.ANSWER
        if self._state is not _State.ANSWER:
            return ""
        answer, self._buffer = self._buffer, ""
        return answer
