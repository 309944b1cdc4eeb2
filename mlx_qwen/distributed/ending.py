"""How a process ends whose computing thread may never come back: at once, with one line."""

import os
import sys
from contextlib import suppress
from typing import NoReturn

FAILED = 1


def end(reason: str = "", *, quiet: bool = False) -> NoReturn:
    """End this process without waiting for any thread: with an error where there is a reason, else well.

    `quiet` leaves it unsaid, where another rank has said it.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    if reason and not quiet:
        with suppress(OSError):
            # On a line of its own, though MLX's ring may be in the midst of one that tells of each closed socket.
            os.write(2, f"\nError: {reason}\n".encode())
    os._exit(FAILED if reason else 0)


def sentence(reason: str) -> str:
    """A reason as the whole error."""
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}. All ranks end; start them again."
