"""The keyboard while an answer is being written."""

import fcntl
import select
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_qwen.cli.reading import MOST_OF_A_LINE

_ECHO_AND_LINES = termios.ECHO | termios.ICANON


@contextmanager
def unechoed() -> Iterator[None]:
    """What is typed meanwhile leaves no traces on a terminal, and waits for the next prompt.

    More than a terminal holds has been cut; it is dropped whole, and that is said.
    """
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
        _drop_if_cut(terminal, quiet)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _drop_if_cut(terminal: int, quiet: list[Any]) -> None:
    quiet[3] &= ~_ECHO_AND_LINES  # of lines that have not ended, only their bytes are counted
    termios.tcsetattr(terminal, termios.TCSADRAIN, quiet)
    (waiting,) = struct.unpack("i", fcntl.ioctl(terminal, termios.FIONREAD, bytes(4)))
    if waiting < MOST_OF_A_LINE:
        return
    while select.select([terminal], [], [], 0.1)[0]:
        termios.tcflush(terminal, termios.TCIFLUSH)
    click.echo(
        "What came during the answer was more than the terminal holds, and is dropped: paste it again.", err=True
    )


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
