"""The plain prompt: for pipes, and for terminals without the extra `chat`."""

import sys
from importlib import import_module
from typing import Protocol

from mlx_qwen.cli.reading import check_whole

PROMPT = ">>> "


class Reader(Protocol):
    """Where questions come from."""

    def read(self) -> str:
        """The next text that was typed.

        Raises EOFError at the end, KeyboardInterrupt for Ctrl-C, PromptError for a text that cannot be taken.
        """


class PlainReader:
    """Reads a line after another; on a terminal with readline's editing where Python has it."""

    def __init__(self) -> None:
        self._may_be_cut = sys.stdin.isatty() and not (sys.stdout.isatty() and _edited())

    def read(self) -> str:
        """The next line; see `Reader`."""
        line = input(PROMPT)
        if self._may_be_cut:
            check_whole(line)
        return line


def _edited() -> bool:
    """Let `input` edit lines, and take what is pasted whole; whether that can be."""
    try:
        readline = import_module("readline")
    except ImportError:
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return True
