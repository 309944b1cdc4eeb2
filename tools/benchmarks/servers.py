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
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.json_files import read_json_object
from mlx_qwen.prompt import Processor
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


def endless_demo(folder: Path) -> Path:
    """The bundled model in fp32, in a folder below `folder`, such that answers go on as far as they may.

    On a CPU the peers cannot multiply experts in bf16. The rows of the tokens that end answers are zero.
    """
    made = folder / "mlx-qwen-demo-endless"
    shutil.copytree(demo_folder(), made)
    config = read_json_object(made / "config.json")
    ends = sorted(Processor.from_directory(made, ModelConfig.from_directory(made)).end_token_ids)
    for file in made.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict), "a file of tensors"
        kept = {name: x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for name, x in tensors.items()}
        for name, x in kept.items():
            if name.endswith("embed_tokens.weight"):
                x[mx.array(ends)] = 0
        mx.save_safetensors(str(file), kept, {"format": "mlx"})
    (made / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return made


@contextmanager
def serving(runtime: str, folder: Path, *flags: str, vlm: Path | None = None) -> Iterator[Running]:
    """A server of a runtime over one checkpoint, until the end of the block.

    `vlm` is the Python of an environment that has mlx-vlm, whose own command starts its server.
    """
    port = _free_port()
    programs: dict[str, Sequence[str]] = {
        OURS: (sys.executable, "-m", "mlx_qwen", "serve", *flags),
        PEER: (sys.executable, "-c", f"{WITHOUT_TORCH}from mlx_lm.server import main; main()"),
        VLM: (str((vlm or Path(sys.executable)).parent / "mlx_vlm.server"),),
    }
    process = subprocess.Popen(
        [*programs[runtime], "--model", str(folder), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
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
