"""Servers in processes of their own, ours and the peers', and one client for all of them."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import mlx.core as mx

from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.json_files import read_json_object
from mlx_qwen.version import installed
from tools.benchmarks.peer import WITHOUT_TORCH

VLM = "mlx-vlm"
_PATIENCE = 120.0


@dataclass(frozen=True, slots=True)
class Running:
    """A server: its process, address, and what its model is called there."""

    process: "subprocess.Popen[str]"
    url: str
    model: str

    def resident(self) -> int:
        """Bytes of memory that its process holds, on Linux."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def files(self) -> int:
        """Open files and connections, on Linux."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def threads(self) -> int:
        """Threads, on Linux."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


def wide_demo(folder: Path) -> Path:
    """The bundled model in fp32, in a folder below `folder`: on a CPU the peers cannot multiply experts in bf16."""
    wide = folder / "mlx-qwen-demo-fp32"
    shutil.copytree(demo_folder(), wide)
    for file in wide.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict), "a file of tensors"
        kept = {name: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for name, x in tensors.items()}
        mx.save_safetensors(str(file), kept, {"format": "mlx"})
    config = read_json_object(wide / "config.json")
    (wide / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return wide


def runtimes() -> list[str]:
    """Ours and the peers that are installed."""
    return [OURS, PEER, *([VLM] if installed("mlx-vlm") else [])]


@contextmanager
def serving(runtime: str, folder: Path, *flags: str) -> Iterator[Running]:
    """A server of a runtime over one checkpoint, until the end of the block."""
    port = _free_port()
    commands: dict[str, Sequence[str]] = {
        OURS: ("-m", "mlx_qwen", "serve", "--model", str(folder), "--port", str(port), *flags),
        PEER: ("-c", _main("mlx_lm.server"), "--model", str(folder), "--port", str(port), "--max-tokens", "64"),
        VLM: ("-c", _main("mlx_vlm.server"), "--model", str(folder), "--port", str(port)),
    }
    process = subprocess.Popen(
        [sys.executable, *commands[runtime]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(process, f"{url}/health")
        yield Running(process, url, folder.name if runtime == OURS else str(folder))
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _main(module: str) -> str:
    return f"{WITHOUT_TORCH}from {module} import main; main()"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _wait_for(process: "subprocess.Popen[str]", url: str) -> None:
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise MLXQwenError(f"A server did not answer at {url}; it ended with {process.poll()}.")


def gauge(server: Running, name: str) -> int:
    """A number of our server's metrics."""
    found = re.search(rf"^mlx_qwen_{name} (\S+)$", httpx.get(f"{server.url}/metrics", timeout=60).text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def events(lines: Iterator[str]) -> Iterator[dict[str, object]]:
    """What a stream of OpenAI's or Anthropic's sends."""
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
