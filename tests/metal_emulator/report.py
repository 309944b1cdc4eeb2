"""What the emulator tells: the error it raises, and counts of launches and bytes."""

from dataclasses import dataclass, field
from typing import Literal

ErrorKind = Literal[
    "compile",
    "metal rules",
    "out of bounds",
    "misaligned",
    "race",
    "double write",
    "divergence",
    "uninitialised read",
    "write to input",
    "unwritten output",
    "threadgroup memory",
    "undefined behaviour",
]


class KernelError(Exception):
    """A fault in a kernel.

    kernel: the kernel's name; kind: what is wrong, one of ErrorKind; message: the fault in words.
    thread, threadgroup: the thread's position in its threadgroup, and that one's in the grid, or None.
    part, line, text: "source" or "header", the line there from 1, and its words; "" and 0 when no line is known.
    """

    def __init__(
        self,
        kernel: str,
        kind: ErrorKind,
        message: str,
        *,
        thread: tuple[int, int, int] | None = None,
        threadgroup: tuple[int, int, int] | None = None,
        part: str = "",
        line: int = 0,
        text: str = "",
    ) -> None:
        self.kernel = kernel
        self.kind = kind
        self.message = message
        self.thread = thread
        self.threadgroup = threadgroup
        self.part = part
        self.line = line
        self.text = text
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        sentence = f"{self.kernel}: {self.kind}: {self.message}"
        if self.thread is not None:
            sentence += f"\n  thread {self.thread} of threadgroup {self.threadgroup}"
        if self.line:
            sentence += f"\n  {self.part} line {self.line}: {self.text}"
        return sentence


@dataclass(frozen=True)
class Traffic:
    """Bytes of one buffer that a launch moves, counted in 64-byte lines.

    read, written: each line once per threadgroup that touches it; unique_read, unique_written: once per launch.
    size: bytes of the buffer.
    """

    size: int
    read: int
    written: int
    unique_read: int
    unique_written: int


@dataclass(frozen=True)
class LaunchRecord:
    """One launch of a kernel.

    grid, threadgroup: sizes in threads; copied_inputs: what MLX makes contiguous first, with a launch for each.
    buffers: traffic of every input and output by name, from the checked mode only.
    """

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    copied_inputs: tuple[str, ...]
    buffers: dict[str, Traffic]

    @property
    def bytes_read(self) -> int:
        """Bytes read from all buffers, each line once per threadgroup."""
        return sum(traffic.read for traffic in self.buffers.values())

    @property
    def bytes_written(self) -> int:
        """Bytes written to all buffers, each line once per threadgroup."""
        return sum(traffic.written for traffic in self.buffers.values())


@dataclass
class Report:
    """All launches made while an emulator was active, in order."""

    launches: list[LaunchRecord] = field(default_factory=list)

    def count(self, kernel: str | None = None) -> int:
        """Number of launches, of one kernel when a name is given."""
        return sum(kernel in (None, launch.kernel) for launch in self.launches)
