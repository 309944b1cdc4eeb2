"""A model divided among ranks of MLX's ring over loopback, beside mlx-lm's division of the same checkpoint."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from tools.benchmarks.peer import WITHOUT_TORCH
from tools.benchmarks.small_model import small_config
from tools.benchmarks.synthetic import write_random_checkpoint

TOKENS = 64
_PATIENCE = 600
_PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"quantize": False, "dtype": "float32"},
    "bf16": {"quantize": False},
    "4 bits": {"bits": 4, "group_size": 64, "dtype": "float32"},
}


def bench_ranks(
    folder: Path,
    *,
    config: ModelConfig | None = None,
    precisions: tuple[str, ...] = tuple(_PRECISIONS),
    ranks: tuple[int, ...] = (2, 4),
    turns: int = 3,
    tokens: int = TOKENS,
) -> Table:
    """Logits, tokens, time a token and bytes of a rank, of each number of `ranks` beside one rank."""
    config = config or small_config(8, hidden_size=1024, intermediate_size=3584, heads=8, head_dim=64)
    write_random_checkpoint(config, folder / "source")
    rows, exact = [], None
    for name in precisions:
        model = folder / name.replace(" ", "-")
        convert(folder / "source", model, **_PRECISIONS[name])
        alone: dict[str, Any] | None = None
        for count in (1, *ranks):
            first, *others = _run(count, model, folder, tokens, turns)
            assert all(rank["answers"] == first["answers"] for rank in others), "ranks wrote different tokens"
            alone = alone or first
            exact = alone if name == "fp32" else exact
            compared = _compared(first, alone) if count > 1 else ["", ""]
            truth = "" if exact is None or name != "bf16" else _far(first, exact)
            rows.append([name, str(count), *compared, truth, _between(first), *_times(first), *_bytes(first)])
    note = (
        f"{config.text.num_hidden_layers} layers of width {config.text.hidden_size}, random weights. Differences are "
        "of the logits behind a prompt of 32 tokens, from those of one rank and between runtimes, "
        f"in parts of the largest; tokens are {tokens} greedy ones. The first that is another than on one rank was "
        "ahead there of the next likely one by so many parts of the largest logit. Times are "
        f"medians of {turns} turns in alternation, each token awaited. All ranks share this machine's cores: times "
        "tell what collectives cost here, and nothing about several machines."
    )
    differ = (f"{OURS} differs", f"{PEER} differs", "both from fp32", "between them")
    header = ("", "ranks", *differ, OURS, PEER, "ratio", "holds", "reads", "peak")
    return Table("A model divided among ranks", note, header, rows)


def _run(count: int, model: Path, folder: Path, tokens: int, turns: int) -> list[dict[str, Any]]:
    """What `count` ranks found, each in a process of its own; one is alone."""
    results = [folder / f"rank-{rank}.json" for rank in range(count)]
    environments = [dict(os.environ)] if count == 1 else ring(count, folder)
    commands = [[sys.executable, "-c", _script(model, tokens, turns, result)] for result in results]
    run_together(commands, environments)
    return [json.loads(result.read_text(encoding="utf-8")) for result in results]


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


def _script(model: Path, tokens: int, turns: int, result: Path) -> str:
    call = f"main(Path({str(model)!r}), {tokens}, {turns}, Path({str(result)!r}))"
    return f"{WITHOUT_TORCH}from pathlib import Path; from tools.benchmarks.one_rank import main; {call}"


def _compared(found: dict[str, Any], alone: dict[str, Any]) -> list[str]:
    cells = []
    for name in ("ours", "theirs"):
        pairs = enumerate(zip(found["answers"][name], alone["answers"][name], strict=True))
        other = next((place for place, (one, another) in pairs if one != another), None)
        tokens = "same tokens"
        if other is not None:
            tokens = f"another token at {other + 1}, ahead by {alone['leads'][name][other]:.0e}"
        cells.append(f"{_difference(found, alone, name):.1e}, {tokens}")
    return cells


def _far(found: dict[str, Any], exact: dict[str, Any]) -> str:
    return " / ".join(f"{_difference(found, exact, name):.1e}" for name in ("ours", "theirs"))


def _difference(found: dict[str, Any], other: dict[str, Any], name: str) -> float:
    logits, expected = (np.array(each["logits"][name]) for each in (found, other))
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def _between(found: dict[str, Any]) -> str:
    ours, theirs = (np.array(found["logits"][name]) for name in ("ours", "theirs"))
    return f"{np.abs(ours - theirs).max() / np.abs(theirs).max():.1e}"


def _times(found: dict[str, Any]) -> list[str]:
    ours, theirs = found["seconds"]["ours"], found["seconds"]["theirs"]
    return [f"{1e3 * ours:.1f} ms", f"{1e3 * theirs:.1f} ms", f"{theirs / ours:.2f}"]


def _bytes(found: dict[str, Any]) -> list[str]:
    return [f"{found[name] / 1e6:.1f} MB" if found[name] else "" for name in ("held", "read", "peak")]


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
