"""Keeps Ctrl-C away from the moments when a cache is half updated."""

import signal
import threading
from types import FrameType, TracebackType


class Uninterrupted:
    """Context in which Ctrl-C waits: KeyboardInterrupt comes at its end instead of in the middle.

    Building one model step updates the cache layer by layer; between two steps all layers have seen the same tokens.
    Only Python's default handler is deferred, and only in the main thread, where signals arrive.
    """

    def __enter__(self) -> None:
        self._pending = False
        self._deferred = (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        )
        if self._deferred:
            signal.signal(signal.SIGINT, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._deferred:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._pending and error is None:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = True
