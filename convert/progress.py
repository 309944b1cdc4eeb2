"""One line on stderr: how much is done, how fast, how long still, and how much memory it took."""

import time
from typing import TextIO

from mlx_qwen.status_line import StatusLine

from .measures import peak_resident_bytes

_INTERVAL = 0.1


class Progress:
    """Counts bytes of the source, `done` of them before; `shown` None shows a line on a terminal and in a notebook."""

    def __init__(
        self, total: int, shown: bool | None, stream: TextIO | None = None, *, done: int = 0, verb: str = "Converting"
    ) -> None:
        self._line = StatusLine(stream)
        self._shown = self._line.watched if shown is None else shown
        self._total, self._done, self._before = total, done, done
        self._verb = verb
        self._start = self._last = time.perf_counter()
        self._baseline = peak_resident_bytes()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            self._draw(time.perf_counter())
            self._line.finish(keep=True)

    def advance(self, nbytes: int) -> None:
        """Note that `nbytes` more of the source are done."""
        self._done += nbytes
        now = time.perf_counter()
        if self._shown and now - self._last >= _INTERVAL:
            self._draw(now)
            self._last = now

    def _draw(self, now: float) -> None:
        elapsed = max(now - self._start, 1e-9)
        speed = (self._done - self._before) / elapsed
        left = (self._total - self._done) / speed if speed else 0.0
        memory = peak_resident_bytes() - self._baseline
        self._line.show(
            f"{self._verb} {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {speed / 1e6:.0f} MB/s, "
            f"{_clock(left)} left, peak memory +{memory / 1e6:.0f} MB"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
