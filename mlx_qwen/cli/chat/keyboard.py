"""The keyboard while an answer is being written."""

import signal
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unechoed() -> Iterator[None]:
    """What is typed meanwhile leaves no traces on a terminal, and waits for the next prompt."""
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, termios.error):
        yield
        return
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


class Interrupts:
    """Within it, Ctrl-C raises KeyboardInterrupt once, and not in the middle of a step: then, behind it."""

    def __init__(self) -> None:
        self._came = self._inside = False

    def __enter__(self) -> "Interrupts":
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Something that is finished before Ctrl-C takes effect."""
        self._inside = True
        came = self._came
        yield
        self._inside = False
        if self._came and not came:
            raise KeyboardInterrupt

    def _interrupt(self, *_: object) -> None:
        came, self._came = self._came, True
        if not (came or self._inside):
            raise KeyboardInterrupt
