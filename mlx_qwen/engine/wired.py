"""Keeps a model's weights resident on Apple GPUs while it generates."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def wired_memory() -> Iterator[None]:
    """Raises the wired limit to what the GPU recommends, and restores it; does nothing without Metal."""
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    try:
        yield
    finally:
        # The limit must not change under work that is still running.
        mx.synchronize()
        mx.set_wired_limit(before)
