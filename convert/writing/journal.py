"""How far a conversion came: a small file on the disk that outlives the process, and keeps two of them apart."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_qwen.errors import ConversionError

_FIRST_LINE = b'{"fingerprint": "'


@dataclass(frozen=True, slots=True)
class Record:
    """The first `pieces` pieces are on the disk, and which tensors among them are worth a remark."""

    pieces: int = 0
    non_finite: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()


class Journal:
    """An open journal: `last` is what was recorded, `found` whether an earlier process of the same work began it.

    One line of JSON each: the fingerprint of the work first, then records, of which the last whole one counts.
    """

    def __init__(self, descriptor: int, fingerprint: str, *, resume: bool) -> None:
        self._descriptor = descriptor
        lines = _whole_lines(descriptor) if resume else []
        self.holds_other_work = bool(lines) and lines[0] != {"fingerprint": fingerprint}
        self.found = bool(lines) and not self.holds_other_work
        self.last = _record(lines[-1]) if self.found and len(lines) > 1 else Record()
        self._fingerprint = fingerprint

    def begin(self) -> None:
        """Make it an empty journal of this work, in place, so that it is a journal whenever a kill comes."""
        self.last = Record()
        line = _encoded({"fingerprint": self._fingerprint})
        self._write(line, 0)
        os.ftruncate(self._descriptor, len(line))
        os.fsync(self._descriptor)

    def commit(self, record: Record) -> None:
        """Remember `record`, whose bytes must be on the disk already."""
        self.last = record
        # A line that a killed process left unfinished is closed off, and never parses.
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        torn = end > 0 and os.pread(self._descriptor, 1, end - 1) != b"\n"
        self._write((b"\n" if torn else b"") + _encoded(asdict(record)), end)
        os.fsync(self._descriptor)

    def _write(self, data: bytes, position: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, position)
            data, position = data[written:], position + written


def is_journal(path: Path, *, alone: bool) -> bool:
    """Whether the file at `path` is a journal; its first line may be cut off where it is `alone` in its folder.

    Other things come there after the first line was written.
    """
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(1000)
    if line.endswith(b"\n"):
        return line.startswith(_FIRST_LINE)
    return alone and line[: len(_FIRST_LINE)] == _FIRST_LINE[: len(line)]


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The descriptor of the file at `path`, made if need be, while no other process has it.

    Raises ConversionError when another one does. The lock ends with the process, however that ends.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path)
            # Between opening and locking, its owner may have finished and removed it.
            if os.fstat(descriptor).st_nlink:
                yield descriptor
                return
        finally:
            os.close(descriptor)
        path.parent.mkdir(parents=True, exist_ok=True)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise ConversionError(
            f"Another process is converting into {path.parent} already. Wait until it ends, or choose another "
            "--mlx-path."
        ) from error


def _encoded(line: dict[str, object]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _whole_lines(descriptor: int) -> list[dict[str, object]]:
    data = b""
    while block := os.pread(descriptor, 1 << 20, len(data)):
        data += block
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _record(line: dict[str, object]) -> Record:
    pieces, non_finite, rounded = (line.get(key) for key in ("pieces", "non_finite", "rounded"))
    assert isinstance(pieces, int) and isinstance(non_finite, list) and isinstance(rounded, list), "as it was committed"
    return Record(pieces, tuple(non_finite), tuple(rounded))
