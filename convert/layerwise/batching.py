"""Windows of tokens, as many at a time as a layer takes at once."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

BATCH_TOKENS = 2048


def window_batches(windows: npt.NDArray[np.integer]) -> Iterator[mx.array]:
    """Token ids [n, T] as batches [B, T] of about 2,048 tokens, of at least one window each."""
    rows = max(1, BATCH_TOKENS // windows.shape[1])
    for first in range(0, len(windows), rows):
        yield mx.array(windows[first : first + rows])
