"""The server that a client talks to: one that runs already, or one of its own that ends with it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO

from mlx_qwen.errors import MLXQwenError
from mlx_qwen.launch.clients import KEY, NO_KEY, Served

HOST, PORT = "127.0.0.1", 8080
_PATIENCE, _BETWEEN = 60.0, 0.1
_LOG_LINES = 20
_LISTENING = re.compile(r"Listening at (http://\S+)")
# Straight to the server, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def serving(model: str | None, *, port: int = PORT) -> Iterator[Served]:
    """The server that listens at `port`, where it has the model; else one that ends with the block.

    Raises MLXQwenError, with the last lines of its log, when that does not come up.
    """
    served = find(model, port=port)
    if served is not None:
        yield served
        return
    # Appended to: the server and this process share one place in the file.
    with tempfile.TemporaryFile("a+b", prefix="mlx-qwen-serve-") as log:
        server = _start(model, log)
        try:
            yield _when_up(server, log)
            if server.poll() is not None:
                raise MLXQwenError(f"The server ended before the client did:\n{_tail(log)}")
        finally:
            _end(server)


def find(model: str | None, *, port: int) -> Served | None:
    """The server of this package at `port`; None where there is none, or it has no such model."""
    return _served(f"http://{HOST}:{port}", model)


def _served(url: str, model: str | None) -> Served | None:
    key = os.environ.get(KEY) or NO_KEY
    for card in _models(url, key):
        if model is None or model in (card["id"], Path(model).name):
            context = card.get("max_input_tokens")
            return Served(url, str(card["id"]), context if isinstance(context, int) else None, key)
    return None


def name_of(model: str | None) -> str:
    """What a server that is started for a model will call it."""
    if model is None:
        return "mlx-qwen-demo"
    return Path(model).resolve().name if Path(model).is_dir() else model


def _models(url: str, key: str) -> list[dict[str, object]]:
    """The models of a server of this package; none of another or none."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with _OPENER.open(request, timeout=5) as response:
            cards = json.load(response)["data"]
            return [card for card in cards if card.get("owned_by") == "mlx-qwen"]
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return []


def _start(model: str | None, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """A server in a session of its own, so that Ctrl-C is not for it; `lifeline` ends it when this process is gone."""
    chosen = [] if model is None else ["--model", model]
    command = [sys.executable, "-m", "mlx_qwen.launch.lifeline", "serve", "--host", HOST, "--port", "0", *chosen]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)


def _when_up(server: subprocess.Popen[bytes], log: IO[bytes]) -> Served:
    deadline = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        listening = _LISTENING.search(_written(log))
        served = _served(listening[1], None) if listening else None
        if served is not None:
            return served
        time.sleep(_BETWEEN)
    said = "ended" if server.poll() is not None else f"does not answer after {_PATIENCE:.0f} s"
    raise MLXQwenError(f"The server {said}:\n{_tail(log)}")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    if server.stdin is not None:
        with suppress(OSError):
            server.stdin.close()


def _tail(log: IO[bytes]) -> str:
    return "\n".join(_written(log).splitlines()[-_LOG_LINES:]) or "(it wrote nothing)"


def _written(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")
