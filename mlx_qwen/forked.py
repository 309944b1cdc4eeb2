"""MLX's threads and devices do not survive a fork: a forked process would wait for them without end."""

import os

from mlx_qwen.errors import MLXQwenError

_computed_in: list[int] = []


def note_computing() -> None:
    """Note that this process computes with MLX from now on.

    Raises:
        MLXQwenError: it was forked from one that had done so already.
    """
    if _computed_in and _computed_in[0] != os.getpid():
        raise MLXQwenError(
            "This process was forked from one that had loaded a model, and MLX does not survive a fork. Start it with "
            'multiprocessing\'s "spawn" method, or load models only in the child process.'
        )
    _computed_in[:] = [os.getpid()]
