"""In how many threads the converter works."""

import os

import mlx.core as mx

_MOST_WORKERS = 16


def core_count() -> int:
    """The machine's cores, of which no more than 16 count: each has a piece of the model in memory."""
    return min(_MOST_WORKERS, os.cpu_count() or 1)


def piece_count() -> int:
    """How many pieces are at work at once: one a core on a CPU, and one on a GPU, which one thread feeds."""
    return 1 if mx.default_device() == mx.gpu else core_count()
