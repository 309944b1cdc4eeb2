"""Where a prompt's prefill leaves checkpoints: at the places from which later prompts go other ways."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlx_qwen.prompt import Processor

GRID = 8192
_NEAREST = 16
_MOST_CUTS = 6
_LEAST_GRID_CUTS = 2
_BEFORE_END = 64
_QUESTION_GRID = 1024


class Span(NamedTuple):
    """The tokens of one image or video: `length` from token `start` on."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Marks:
    """What messages look like in token ids: `start` begins one, then comes its role."""

    start: int
    user: tuple[int, ...]
    system: tuple[int, ...]
    tool_response: int | None

    @classmethod
    def of(cls, processor: Processor) -> "Marks | None":
        """Those of a tokenizer with Qwen's special tokens; None for another."""
        start = processor.tokenizer.token_to_id("<|im_start|>")
        if start is None:
            return None
        user, system = (tuple(processor.encode(role)) for role in ("user", "system"))
        return cls(start, user, system, processor.tokenizer.token_to_id("<tool_response>"))


class Messages(NamedTuple):
    """Where the messages of a prompt start, and its end behind them."""

    places: list[int]
    system_end: int | None
    question: tuple[int, int] | None


def anchors(ids: Sequence[int], marks: Marks | None, *, media: Sequence[Span] = (), after: int = 0) -> list[int]:
    """How many tokens to read before each checkpoint, ascending: all above `after`, the prompt's length the last.

    They are the end of the first system message (its tools are in it); the start and the end of the last question, and
    in one of more than 1,024 tokens the last multiple of that, from its start, that lies 64 or more before its end; the
    start of the last message, which is the generation prompt; a grid that is the same for every prompt; and in a
    prompt without messages a place near its end. One that follows another by less than 16 tokens is left out, and
    none lies within an image or video. About 6 of them are not the prompt's end: the grid of 8,192 tokens is made
    coarser by doubling, so that it keeps places that other prompts have.

    Args:
        ids: the prompt, placeholders of media expanded.
        marks: from `Marks.of`.
        media: where images and videos lie; nothing is cut there.
        after: how many tokens the checkpoint has that the prefill goes on from.
    """
    N = len(ids)
    places = {min(place, N) for place in _places(ids, marks)}
    room = max(_LEAST_GRID_CUTS, _MOST_CUTS - sum(after < place < N for place in places))
    grid = GRID
    while (N - 1) // grid - after // grid > room:
        grid *= 2
    places |= set(range(grid, N, grid))
    kept = [after]
    for place in sorted(_outside(place, media) for place in places):
        if kept[-1] + _NEAREST <= place < N:
            kept.append(place)
    return [*kept[1:], N] if after < N else []


def question_end(ids: Sequence[int], marks: Marks | None) -> int:
    """How many tokens end with the last question: what comes later belongs to its answer, tool results included.

    Templates leave reasoning out of history once another question follows, so that no later prompt needs to repeat it.
    The prompt's length where it holds no question.
    """
    question = None if marks is None else _messages(ids, marks).question
    return len(ids) if question is None else question[1]


def _places(ids: Sequence[int], marks: Marks | None) -> list[int]:
    messages = None if marks is None else _messages(ids, marks)
    if messages is None or not messages.places:
        return [len(ids) - _BEFORE_END]
    found = [messages.places[-1]]
    found += [] if messages.system_end is None else [messages.system_end]
    if messages.question is not None:
        start, end = messages.question
        # Agents put notes before what is asked, and write later questions behind the same ones.
        found += [start, start + max(end - start - _BEFORE_END, 0) // _QUESTION_GRID * _QUESTION_GRID, end]
    return found


def _messages(ids: Sequence[int], marks: Marks) -> Messages:
    places = np.flatnonzero(np.asarray(ids) == marks.start).tolist()
    system_end, question = None, None
    for index, (start, end) in enumerate(pairwise([*places, len(ids)])):
        if _has(ids, start + 1, marks.system) and index == 0:
            system_end = end
        if _has(ids, start + 1, marks.user):
            # A line ends the role; a result stands at the beginning of the message, and in quotes elsewhere.
            first = start + 1 + len(marks.user)
            if marks.tool_response is None or marks.tool_response not in ids[first : min(first + 2, end)]:
                question = (start, end)
    return Messages(places, system_end, question)


def _has(ids: Sequence[int], start: int, part: tuple[int, ...]) -> bool:
    return tuple(ids[start : start + len(part)]) == part


def _outside(place: int, media: Sequence[Span]) -> int:
    """The place itself, or the start of the image or video that it lies within."""
    return next((start for start, length in media if start < place < start + length), place)
