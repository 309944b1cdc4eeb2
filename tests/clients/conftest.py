"""The clients that `make clients` installs, and a scripted server that they all talk to."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "build" / "clients" / "node_modules" / ".bin"
_READ: list[str] = []


@dataclass
class Request:
    """A request as the engine saw it: how much of its prompt began an earlier prompt or its answer, and was cached."""

    prompt: list[int]
    answer: list[int]
    cached: int
    common: int = 0


@dataclass
class ScriptedServer:
    """A server's port, and the files it is told by and tells with."""

    port: int
    script: Path
    records: Path
    requests: list[Request] = field(default_factory=list)

    def follow(self, script: list[list]) -> None:
        """Answer by `script` from now on."""
        self.script.write_text(json.dumps(script))

    def new_requests(self) -> list[Request]:
        """Those since the last call."""
        lines = self.records.read_text().splitlines()[len(self.requests) :] if self.records.exists() else []
        new = []
        for line in lines:
            request = Request(**json.loads(line))
            request.common = max((_common(request.prompt, one.prompt + one.answer) for one in self.requests), default=0)
            self.requests.append(request)
            new.append(request)
        return new


def _common(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def told(client: str, turn: str, requests: list[Request]) -> None:
    """Put a turn's numbers into the summary."""
    prompt = sum(len(one.prompt) for one in requests)
    common, cached = sum(one.common for one in requests), sum(one.cached for one in requests)
    share = f"{cached / common:.1%}" if common else "-"
    _READ.append(
        f"{client:9} {turn:14} {len(requests):2} requests {prompt:7,} tokens  {common:7,} known  {cached:7,} cached "
        f"({share:>6})  {prompt - cached:6,} computed"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was read of prompts, and what was not."""
    for line in _READ:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    """The engine with the bundled weights, its tokens forced by a script."""
    if not PROGRAMS.is_dir():
        pytest.skip("the clients are not installed: `make clients` installs them into build/ and runs these tests")
    from tests.clients.matrix_products import preloaded
    from tests.clients.widened import widened_checkpoint

    folder = tmp_path_factory.mktemp("server")
    checkpoint = widened_checkpoint(folder / "bundled-wide")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = ScriptedServer(port, folder / "script.json", folder / "records")
    made.follow([])
    arguments = [str(port), str(checkpoint), str(made.script), str(made.records)]
    command = [sys.executable, "-m", "tests.clients.scripted_server", *arguments]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, **preloaded(folder)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        _wait_for(port, process, folder / "log")
        yield made
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())
