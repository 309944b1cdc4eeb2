"""Finds the tags of Qwen3.5's tool calls in text that arrives in pieces, looking at every character once."""

import re
from collections.abc import Iterable
from enum import Enum, auto
from typing import NamedTuple

# Longer names are text: what may become a tag is held back, and must not be held for ever.
_LONGEST_NAME = 256
_NAME = f"([^<>\\n]{{1,{_LONGEST_NAME}}})"
_TAG = re.compile(
    f"<tool_call>|</tool_call>|<function={_NAME}>|</function>|<parameter={_NAME}>|</parameter ?/?>|<parameter ?/>"
)
_NAMED = ("<function=", "<parameter=")
_FIXED = (
    "<tool_call>",
    "</tool_call>",
    "</function>",
    *("</parameter>", "</parameter />", "</parameter/>", "<parameter/>", "<parameter />"),
)


class Kind(Enum):
    """What a piece of model text is."""

    TEXT = auto()
    OPEN_BLOCK = auto()
    CLOSE_BLOCK = auto()
    FUNCTION = auto()
    CLOSE_FUNCTION = auto()
    PARAMETER = auto()
    CLOSE_PARAMETER = auto()


class Tag(NamedTuple):
    """A tag, or text between tags; `name` is a function's or parameter's.

    `on_new_line`: whether only blanks stand before it on its line.
    """

    kind: Kind
    raw: str
    name: str = ""
    on_new_line: bool = False

    @property
    def blank(self) -> bool:
        """Whether it is nothing but white space."""
        return self.kind is Kind.TEXT and self.raw.isspace()


class TagReader:
    """Cuts text into tags and what stands between them; a tag comes whole, however the text was cut."""

    def __init__(self) -> None:
        self._held = ""
        self._on_new_line = True

    def push(self, text: str) -> list[Tag]:
        """Takes the next piece and returns what is certain by now."""
        text, self._held = self._held + text, ""
        tags: list[Tag] = []
        done = 0
        for found in _TAG.finditer(text):
            self._add_text(tags, text[done : found.start()])
            tags.append(Tag(_kind(found[0]), found[0], (found[1] or found[2] or "").strip(), self._on_new_line))
            self._on_new_line = False
            done = found.end()
        last = text.rfind("<", done)
        if last >= 0 and _may_become_a_tag(text[last:]):
            self._held = text[last:]
            text = text[:last]
        self._add_text(tags, text[done:])
        return tags

    def finish(self) -> list[Tag]:
        """What was held back, and is text after all."""
        tags: list[Tag] = []
        self._add_text(tags, self._held)
        self._held = ""
        return tags

    def _add_text(self, tags: list[Tag], text: str) -> None:
        if text:
            tags.append(Tag(Kind.TEXT, text))
            line = text.rpartition("\n")[2]
            self._on_new_line = not line.strip() and (self._on_new_line or "\n" in text)


def partial_tag_length(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a proper start of one of `tags`; 0 when there is none."""
    return max((_overlap(text, tag) for tag in tags), default=0)


def _overlap(text: str, tag: str) -> int:
    start = text.find(tag[0], max(0, len(text) - len(tag) + 1))
    while start >= 0 and not tag.startswith(text[start:]):
        start = text.find(tag[0], start + 1)
    return len(text) - start if start >= 0 else 0


def _kind(tag: str) -> Kind:
    if tag == "<tool_call>":
        return Kind.OPEN_BLOCK
    if tag == "</tool_call>":
        return Kind.CLOSE_BLOCK
    if tag.startswith("<function="):
        return Kind.FUNCTION
    if tag == "</function>":
        return Kind.CLOSE_FUNCTION
    return Kind.PARAMETER if tag.startswith("<parameter=") else Kind.CLOSE_PARAMETER


def _may_become_a_tag(text: str) -> bool:
    if text.startswith(_NAMED):
        return "\n" not in text and len(text) <= len("<parameter=") + _LONGEST_NAME
    return any(tag.startswith(text) for tag in (*_FIXED, *_NAMED))
