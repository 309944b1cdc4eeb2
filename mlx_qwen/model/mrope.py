"""M-RoPE: where the tokens of text, images and videos stand in time, height and width.

Source: transformers' `Qwen3_5Model.get_rope_index`; Bai et al., "Qwen3-VL Technical Report" (2025).
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Grid, Kind


def rope_positions(kinds: np.ndarray, grids: dict[Kind, Iterator[Grid]], merge: int, *, start: int = 0) -> np.ndarray:
    """Time, height and width positions of a row of tokens, int [3, T].

    Text counts on from the largest position so far; an image stands at one time, its rows and columns counted from
    there.

    Args:
        kinds: int [T], a Kind for every token.
        grids: the images, and the temporal pairs of the videos, that are still to come; taken as they are met.
        merge: side of the squares of patches that became one token.
        start: position of the first token.

    Raises:
        PromptError: placeholders and grids do not match.
    """
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(kinds)]
    parts: list[np.ndarray] = [np.zeros((3, 0), np.int64)]
    for first, end in pairwise(edges):
        if first == end:
            continue
        kind, left = Kind(int(kinds[first])), end - first
        if kind is Kind.TEXT:
            parts.append(np.broadcast_to(np.arange(start, start + left), (3, left)))
            start += left
        while kind is not Kind.TEXT and left:
            grid = next(grids[kind], None)
            if grid is None or grid.tokens(merge) > left:
                raise PromptError(_mismatch(kind, left, grid, merge))
            parts.append(_image_positions(grid, merge, start))
            start += max(grid.rows, grid.columns) // merge
            left -= grid.tokens(merge)
    return np.concatenate(parts, axis=1)


def _image_positions(grid: Grid, merge: int, start: int) -> np.ndarray:
    shape = (grid.frames, grid.rows // merge, grid.columns // merge)
    return np.indices(shape).reshape(3, -1) + start


def _mismatch(kind: Kind, left: int, grid: Grid | None, merge: int) -> str:
    name = kind.name.lower()
    expected = f"no further {name} was given" if grid is None else f"the next {name} needs {grid.tokens(merge):,}"
    return (
        f"The prompt has {left:,} {name} placeholders in a row where {expected}. Pass one {name} for each place in the "
        "prompt, in order, or let the chat template set the placeholders."
    )
