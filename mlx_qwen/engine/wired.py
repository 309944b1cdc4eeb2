"""Keeps a model's weights resident on Apple GPUs while it generates."""

import mlx.core as mx


class WiredMemory:
    """Raises the wired limit to what the GPU recommends while there is work; does nothing without Metal."""

    def __init__(self) -> None:
        self._before: int | None = None

    def raise_limit(self) -> None:
        """Keep weights resident from now on."""
        if self._before is None and mx.metal.is_available():
            self._before = mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))

    def restore(self) -> None:
        """Restore the limit of before."""
        if self._before is not None:
            # The limit must not change under work that is still running.
            mx.synchronize()
            mx.set_wired_limit(self._before)
            self._before = None
