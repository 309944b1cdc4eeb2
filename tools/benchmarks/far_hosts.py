"""Hosts with a network of a chosen delay between them: network namespaces of a Linux machine, as root.

Each has a TUN device, and one process carries packets from one to the other once they have waited for long enough. It
is a real-time process where that is allowed: ranks that wait for each other do so at full speed on every core.
"""

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from types import TracebackType

from mlx_qwen.errors import MLXQwenError

_TUNSETIFF, _TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
_MTU = 65_000
_SECONDS = struct.Struct("d")


class Delay:
    """How long a packet waits on its way, in a file that all processes see."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            self._shared = mmap(opened.fileno(), _SECONDS.size)

    @property
    def seconds(self) -> float:
        """The delay of one way."""
        seconds: float = _SECONDS.unpack(self._shared[:])[0]
        return seconds

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._shared[:] = _SECONDS.pack(seconds)


class FarHosts:
    """`count` hosts, as a context; raises MLXQwenError where they cannot be made.

    Attributes:
        addresses: of each host.
        delay_file: what `Delay` reads and writes; 0 at first.
    """

    def __init__(self, count: int) -> None:
        self.addresses = [f"10.77.0.{host + 1}" for host in range(count)]
        self._names = [f"mlx-qwen-{os.getpid()}-{host}" for host in range(count)]
        self._stack = ExitStack()

    def __enter__(self) -> "FarHosts":
        if sys.platform != "linux" or os.geteuid() or shutil.which("ip") is None:
            raise MLXQwenError("Hosts of a network of their own need Linux, root and the command `ip` of iproute2.")
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self.delay_file = folder / "delay"
            self.delay_file.write_bytes(_SECONDS.pack(0.0))
            devices = [stack.enter_context(_Host(*one)) for one in zip(self._names, self.addresses, strict=True)]
            stack.enter_context(_carrier(devices, self.delay_file))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def command(self, host: int, words: Sequence[str]) -> list[str]:
        """A command, to be run on a host."""
        return ["ip", "netns", "exec", self._names[host], *words]


class _Host:
    """A namespace with a device of one address; gives the device."""

    def __init__(self, name: str, address: str) -> None:
        self._name, self._address = name, address
        self._device = -1

    def __enter__(self) -> int:
        import fcntl

        _ip("netns", "add", self._name)
        try:
            self._device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            asked = struct.pack("16sH22x", b"far%d", _TUN_WITHOUT_HEADER)
            device = fcntl.ioctl(self._device, _TUNSETIFF, asked)[:16].rstrip(b"\0").decode()
            _ip("link", "set", device, "netns", self._name)
            inside = ("-n", self._name)
            _ip(*inside, "addr", "add", f"{self._address}/24", "dev", device)
            _ip(*inside, "link", "set", device, "mtu", str(_MTU), "up")
            _ip(*inside, "link", "set", "lo", "up")
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError):
                raise MLXQwenError(f"A host cannot have a network device: {error}.") from error
            raise
        return self._device

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._device >= 0:
            os.close(self._device)
        _ip("netns", "delete", self._name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise MLXQwenError(f"`ip {' '.join(words)}` failed: {done.stderr.strip()}")


def _carrier(devices: Sequence[int], delay_file: Path) -> ExitStack:
    """The process that carries packets, which ends with this context or this process."""
    stack = ExitStack()
    ours, its = socket.socketpair()
    with its:
        words = [sys.executable, "-m", "tools.benchmarks.carrying", str(delay_file), str(its.fileno())]
        process = subprocess.Popen(
            [*words, *map(str, devices)],
            pass_fds=[its.fileno(), *devices],
            cwd=Path(__file__).resolve().parents[2],
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    stack.callback(ours.close)
    return stack
