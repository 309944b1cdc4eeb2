"""Hosts of Linux's network namespaces with a cable between each two, as Macs stand that Thunderbolt connects."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path


class Hosts:
    """Three hosts whose ring goes over three cables; `cut` pulls one."""

    count = 3

    def __init__(self) -> None:
        self._names = [f"mlxq{os.getpid()}-{rank}" for rank in range(self.count)]

    def entered(self, rank: int) -> list[str]:
        """What a command begins with that runs on a host."""
        return ["ip", "netns", "exec", self._names[rank]]

    def hostfile(self, folder: Path) -> str:
        """The ring's file: each rank by its address on the cable to the rank before."""
        file = folder / "hosts.json"
        before = [(rank - 1) % self.count for rank in range(self.count)]
        file.write_text(json.dumps([[f"{_address(rank, before[rank])}:5000"] for rank in range(self.count)]))
        return str(file)

    def cut(self, one: int, other: int) -> None:
        """Pull the cable between two hosts."""
        _run(*self.entered(one), "ip", "link", "set", _end(one, other), "down")

    def connect(self) -> None:
        """Make the hosts and their cables; raises OSError or CalledProcessError where that is not allowed."""
        for name in self._names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for one, other in combinations(range(self.count), 2):
            ends = [(one, other), (other, one)]
            named = [word for own, far in ends for word in (_end(own, far), self._names[own])]
            _run("ip", "link", "add", named[0], "netns", named[1], "type", "veth", "peer", named[2], "netns", named[3])
            for own, far in ends:
                _run("ip", "-n", self._names[own], "address", "add", f"{_address(own, far)}/24", "dev", _end(own, far))
                _run("ip", "-n", self._names[own], "link", "set", _end(own, far), "up")
        # Rank 0 is known by its address on another cable than the one that rank 1 has to it.
        _run("ip", "-n", self._names[1], "route", "add", _address(0, 2), "via", _address(0, 1))

    def remove(self) -> None:
        """Take all of it down."""
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Three connected hosts, which are gone in the end."""
    made = Hosts()
    try:
        made.connect()
        yield made
    finally:
        made.remove()


def are_possible() -> bool:
    """Whether this machine lets us make hosts."""
    if shutil.which("ip") is None:
        return False
    name = f"mlxq{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return made.returncode == 0


def _end(own: int, far: int) -> str:
    return f"to{far}"


def _address(own: int, far: int) -> str:
    return f"10.77.{min(own, far) + max(own, far)}.{own + 1}"


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
