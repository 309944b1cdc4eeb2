"""One line that tells how far work is, replaced as it goes on: on a terminal, in a notebook, or in a log."""

import sys
import time
from importlib import import_module
from typing import TextIO

_SECONDS_BETWEEN_LOG_LINES = 10.0


class StatusLine:
    """Shows the latest of many texts.

    A terminal's line is overwritten; a notebook (Jupyter, VS Code) has an output of its own that is updated, without
    the colour of an error. Anywhere else a line is added now and then, so that logs stay short.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._notebook = _Notebook() if stream is None and in_notebook() else None
        self._latest, self._logged = "", time.perf_counter()

    @property
    def watched(self) -> bool:
        """Whether someone sees the line change."""
        return self._terminal or self._notebook is not None

    def show(self, text: str) -> None:
        """Replace the line."""
        self._latest = text
        if self._notebook is not None:
            self._notebook.show(text)
        elif self._terminal:
            self._write(f"\r\033[K{text}")
        elif time.perf_counter() - self._logged >= _SECONDS_BETWEEN_LOG_LINES:
            self._logged = time.perf_counter()
            self._write(f"{text}\n")

    def finish(self, *, keep: bool) -> None:
        """Leave the last text where it is, or with `keep` False wipe it from a terminal or notebook."""
        if self._notebook is not None:
            if not keep:
                self._notebook.show("")
        elif self._terminal:
            self._write("\n" if keep else "\r\033[K")
        elif self._latest:
            self._write(f"{self._latest}\n")
        self._latest = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    return shell is not None and hasattr(shell.get_ipython(), "kernel")


class _Notebook:
    """An output of the running cell that is replaced in place."""

    def __init__(self) -> None:
        self._display = import_module("IPython.display")
        self._handle = None

    def show(self, text: str) -> None:
        content = {"text/plain": text}
        if self._handle is None:
            self._handle = self._display.display(content, raw=True, display_id=True)
        else:
            self._display.update_display(content, raw=True, display_id=self._handle.display_id)
