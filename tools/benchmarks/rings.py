"""Processes of MLX's ring over loopback: how they are started, and how they share the cores of one machine."""

import json
import os
import socket
import stat
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

_PATIENCE = 600
_MICROSECONDS = 1000


def ring(count: int, folder: Path) -> list[dict[str, str]]:
    """Environments of `count` processes of MLX's ring over loopback; a file in `folder` names their ports."""
    hosts = folder / "ring.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(count)]), encoding="utf-8")
    return [{**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]


def _free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens at."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def run_together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> None:
    """Run the processes of a ring to their end; raises RuntimeError where one fails."""
    pairs = zip(commands, environments, strict=True)
    processes = [subprocess.Popen(command, env=environment) for command, environment in pairs]
    end = time.monotonic() + _PATIENCE
    try:
        codes = [process.wait(max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        raise RuntimeError(f"ranks ended with {codes}")


def join_sleeping() -> mx.distributed.Group | None:
    """This process's end of MLX's ring, whose threads sleep while they wait; None where it is the only rank.

    MLX asks its sockets for data without end, which takes a core from the very rank that has to send it where there
    are more ranks than cores. Here each asks for at most a millisecond, and the kernel wakes it when data comes.
    """
    if "MLX_RANK" not in os.environ:
        return None
    before = _sockets()
    group = mx.distributed.init(strict=True, backend="ring")
    for descriptor in _sockets() - before:
        with socket.socket(fileno=os.dup(descriptor)) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, _MICROSECONDS))
        os.set_blocking(descriptor, True)
    return group


def _sockets() -> set[int]:
    """Those that this process has open."""
    found = set()
    for entry in Path("/dev/fd").iterdir():
        try:
            if stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode):
                found.add(int(entry.name))
        except OSError:  # what listed the folder is closed by now
            continue
    return found
