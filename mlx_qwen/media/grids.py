"""The patches of images and videos: how many there are, and how many tokens they become."""

from enum import IntEnum
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import PromptError


class Kind(IntEnum):
    """What a token stands for."""

    TEXT = 0
    IMAGE = 1
    VIDEO = 2


class Grid(NamedTuple):
    """Patches of one image (`frames` 1) or video: temporal pairs of frames, rows and columns."""

    frames: int
    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Rows of `pixel_values` that belong to it."""
        return self.frames * self.rows * self.columns

    def tokens(self, merge: int) -> int:
        """Placeholders that it takes in the prompt, when squares of `merge` x `merge` patches become one token."""
        return self.patches // merge**2

    def by_frame(self) -> list["Grid"]:
        """One grid a temporal pair, as timestamps stand between them in the prompt."""
        return [Grid(1, self.rows, self.columns)] * self.frames


def read_grids(grid_thw: mx.array, merge: int) -> list[Grid]:
    """The rows (frames, rows, columns) of an int array [n, 3]; raises PromptError for sides that do not merge."""
    table = np.array(grid_thw)
    if table.ndim != 2 or table.shape[1] != 3 or table.min(initial=1) < 1 or (table[:, 1:] % merge).any():
        raise PromptError(
            f"The grids of patches are {table.tolist()}, expected frames, rows and columns of each, the last two "
            f"multiples of {merge}. Pass image_grid_thw as the image processor returned it."
        )
    return [Grid(*map(int, row)) for row in table]
