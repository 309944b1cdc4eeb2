"""A pseudo-terminal to drive a command through, and the screen that its output makes."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Mapping
from pathlib import Path

# Far more than anything takes, as the machine may be busy; nothing waits for it unless something is wrong.
PATIENCE = 120.0
_CODE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[=>78()][B0]?")
_PROMPT = re.escape("\x1b[?2004h")  # from here on, pasted text is marked as such
# Takes the terminal, without which Ctrl-C reaches nobody, and runs the command behind some code of the test's.
_COMMAND = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
exec(sys.argv.pop(1))
from mlx_qwen.cli import main
main()
"""


class Terminal:
    """`mlx-qwen` on a terminal of its own. What it prints is in `output`; `wait_for` reads on.

    `fresh` are the terminal's modes before anything ran on it.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        first: str = "",
        rows: int = 40,
        columns: int = 100,
    ) -> None:
        self._own, other = pty.openpty()
        fcntl.ioctl(self._own, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.fresh = self.modes()
        states = {"XDG_STATE_HOME": str(cwd / "state"), "XDG_CACHE_HOME": str(cwd / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, first, *map(str, arguments)],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env={**os.environ, **states, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})},
            cwd=cwd,
        )
        os.close(other)
        self.output = ""
        self._seen = 0
        self._rows, self._columns = rows, columns

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def type(self, text: str) -> None:
        """Send keys, reading what comes meanwhile, as a terminal does: it takes 4 kB at a time."""
        data = text.encode()
        while data:
            self._read(0)
            if select.select([], [self._own], [], 1)[1]:
                data = data[os.write(self._own, data[:1024]) :]

    def interrupt(self) -> str:
        """Press Ctrl-C at a prompt until there is a new one; what was printed up to there.

        Python's readline takes no notice of a signal between its prompt and its first wait for a key.
        """
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            self.type("\x03")
            if (passed := self._passed(_PROMPT, 5)) is not None:
                return passed
        raise AssertionError(f"Ctrl-C brought no prompt; the last is {self.output[self._seen :][-600:]!r}")

    def paste(self, text: str) -> None:
        """Send a text as terminals send what is pasted."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def wait_for(self, pattern: str) -> str:
        """Read until the pattern occurs behind what the last call found; what was printed up to its end."""
        if (passed := self._passed(pattern, PATIENCE)) is None:
            raise AssertionError(f"{pattern!r} did not come; the last is {self.output[self._seen :][-600:]!r}")
        return passed

    def wait_for_prompt(self) -> str:
        """Read until a line can be typed; what was printed up to there."""
        return self.wait_for(_PROMPT)

    def end(self) -> int:
        """Read until the process ends; its exit code."""
        limit = time.monotonic() + PATIENCE
        while self._read(1):
            assert time.monotonic() < limit, f"the process goes on; it printed {self.output[-2000:]!r}"
        return self.process.wait(PATIENCE)

    def modes(self) -> list[object]:
        """How the terminal treats what is typed and printed now."""
        return termios.tcgetattr(self._own)

    def screen(self) -> str:
        """All lines that were printed, those that scrolled away too."""
        return screen(self.output, rows=self._rows, columns=self._columns)

    def _passed(self, pattern: str, seconds: float) -> str | None:
        limit = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.output, self._seen)) is None:
            if time.monotonic() > limit or not self._read(1):
                return None
        passed, self._seen = self.output[self._seen : found.end()], found.end()
        return passed

    def _read(self, seconds: float) -> bool:
        """Take what was printed within some seconds; False at the end."""
        if not select.select([self._own], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._own, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self.output += data.decode(errors="replace")
        return bool(data)


def screen(output: str, *, rows: int, columns: int) -> str:
    """What a terminal shows of an output, with all that scrolled away above it; styles are left out."""
    paper, place = _Paper(rows, columns), 0
    while place < len(output):
        code = _CODE.match(output, place)
        if code is None:
            paper.write(output[place])
            place += 1
        else:
            if code[2] and "?" not in code[1]:
                paper.obey(code[2], code[1])
            place = code.end()
    return "\n".join("".join(line).rstrip() for line in paper.lines)


class _Paper:
    """Lines of cells, of which a cursor reaches the last ones."""

    def __init__(self, rows: int, columns: int) -> None:
        self.lines: list[list[str]] = [[]]
        self._line = self._column = self._top = 0
        self._rows, self._columns = rows, columns

    def write(self, letter: str) -> None:
        if letter == "\r":
            self._column = 0
        elif letter == "\n":
            self._go(self._line + 1)
        elif letter == "\b":
            self._column = max(self._column - 1, 0)
        elif letter >= " ":
            width = 2 if unicodedata.east_asian_width(letter) in "WF" else 1
            if self._column + width > self._columns:
                self._go(self._line + 1)
                self._column = 0
            cells = self.lines[self._line]
            cells += " " * (self._column - len(cells))
            cells[self._column : self._column + width] = [letter, *[""] * (width - 1)]
            self._column += width

    def obey(self, code: str, numbers: str) -> None:
        count = int(numbers.partition(";")[0] or 1) if numbers not in ("", "0") else 1
        if code in "AB":
            line = self._line + (count if code == "B" else -count)
            self._go(min(max(line, self._top), self._top + self._rows - 1))
        elif code in "CDG":
            self._column = max({"C": self._column + count, "D": self._column - count, "G": count - 1}[code], 0)
        elif code in "JK" and numbers in ("", "0"):
            del self.lines[self._line][self._column :]
            if code == "J":
                del self.lines[self._line + 1 :]

    def _go(self, line: int) -> None:
        self._line = line
        self.lines += [[] for _ in range(line + 1 - len(self.lines))]
        self._top = max(self._top, line - self._rows + 1)
