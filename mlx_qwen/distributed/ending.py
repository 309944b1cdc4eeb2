"""How a process ends whose computing thread may never come back: at once, with one line."""

import os
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

FAILED = 1
# No paste is marked any more, and the cursor is shown.
_PLAIN = b"\x1b[?2004l\x1b[?25h"


def keep_terminal() -> None:
    """Remember how the terminal is now: `end` leaves it so, whatever is being typed then."""
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (OSError, ValueError, AttributeError, termios.error):
        return

    def restore() -> None:
        # Where another program has the terminal, changing it would stop this process.
        with suppress(OSError, termios.error):
            if os.tcgetpgrp(terminal) == os.getpgrp() and termios.tcgetattr(terminal) != before:
                termios.tcsetattr(terminal, termios.TCSANOW, before)
                os.write(terminal, _PLAIN)

    _restoring.append(restore)


def end(reason: str = "", *, quiet: bool = False) -> NoReturn:
    """End this process without waiting for any thread: with an error where there is a reason, else well.

    `quiet` leaves it unsaid, where another rank has said it.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    for restore in _restoring:
        restore()
    if reason and not quiet:
        with suppress(OSError):
            # On a line of its own, though MLX's ring may be in the midst of one that tells of each closed socket.
            os.write(2, f"\nError: {reason}\n".encode())
    os._exit(FAILED if reason else 0)


def sentence(reason: str) -> str:
    """A reason as the whole error."""
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}. All ranks end; start them again."


_restoring: list[Callable[[], None]] = []
