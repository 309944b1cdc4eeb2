"""Hosts with a delay between them are as far apart as was asked, and ranks on them wait for each other."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks.far_hosts import Delay, FarHosts
from tools.benchmarks.round_trip import bench_round_trip
from tools.benchmarks.small_model import small_config

HAS_HOSTS = (
    sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") is not None and Path("/dev/net/tun").exists()
)
pytestmark = pytest.mark.skipif(not HAS_HOSTS, reason="needs Linux, root, iproute2 and TUN devices")

_ECHO = """
import socket
server = socket.create_server(("10.77.0.2", 7000))
print("ready", flush=True)
connection, _ = server.accept()
while data := connection.recv(4096):
    connection.sendall(data)
"""
_ASK = """
import socket, time
connection = socket.create_connection(("10.77.0.2", 7000))
started = time.perf_counter()
for _ in range(10):
    connection.sendall(b"x")
    connection.recv(1)
print((time.perf_counter() - started) / 10)
"""


def _namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines() if line.startswith(f"mlx-qwen-{os.getpid()}-")}


def test_a_message_and_its_answer_take_two_delays_and_the_hosts_are_gone_in_the_end() -> None:
    with FarHosts(2) as hosts:
        Delay(hosts.delay_file).seconds = 0.02
        words = hosts.command(1, [sys.executable, "-c", _ECHO])
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None and server.stdout.readline() == "ready\n"
                asked = hosts.command(0, [sys.executable, "-c", _ASK])
                seconds = float(subprocess.run(asked, capture_output=True, check=True, timeout=30).stdout)
            finally:
                server.kill()
        assert len(_namespaces()) == 2
    assert 0.04 <= seconds < 0.06
    assert not _namespaces()


def test_a_token_on_far_ranks_waits_for_each_of_its_sums(tmp_path: Path) -> None:
    config = small_config(4, hidden_size=64, intermediate_size=64, heads=4, head_dim=16)
    table = bench_round_trip(tmp_path, config=config, round_trips=(0.004,), turns=1, tokens=4)
    (far,) = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert far["added round trip"] == "4 ms"
    sums = 2 * 4 + 1
    # One way a sum, and one for the logits; mlx-lm waits two ways for each of its sums, two a layer.
    for cell, messages in (("waiting", sums + 1), ("planned", sums + 1), ("mlx-lm, a token", 2 * (sums - 1))):
        assert float(far[cell].split()[0]) >= 0.95 * 2 * messages
