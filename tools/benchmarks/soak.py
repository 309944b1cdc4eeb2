"""Minutes of random requests through one engine: what it holds has to stay where it was."""

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_qwen.bench.table import Table
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.loading import load_model
from mlx_qwen.recommended import SamplingParameters
from tools.benchmarks.stepping import request

_PREFIX_BYTES = 8 << 20
_LINES = 6
_CLIENTS = 6


class Held(NamedTuple):
    """What the process held at one time; bytes but for the counts."""

    requests: int
    arrays: int
    resident: int
    prefixes: int
    files: int
    threads: int


def bench_soak(minutes: float) -> Table:
    """Requests that join, leave and are cancelled, with drafts and prefixes, on the bundled model."""
    folder = demo_folder()
    model = load_model(folder, ModelConfig.from_directory(folder))
    mx.eval(model.parameters())
    engine, requests, rows = Engine(model, prefixes=PrefixIndex(_PREFIX_BYTES)), count(), []
    started = time.monotonic()
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for line in range(1, _LINES + 1):
            until = started + 60 * minutes * line / _LINES
            for client in [clients.submit(_ask_until, engine, requests, until) for _ in range(_CLIENTS)]:
                client.result()
            rows.append((f"{(time.monotonic() - started) / 60:.1f} min", *_shown(_held(engine, next(requests)))))
    note = (
        f"{_CLIENTS} clients of the bundled model, a third of whose answers are cancelled, prefixes within "
        f"{_PREFIX_BYTES >> 20} MiB; nobody asks while a line is taken. Memory in MiB."
    )
    header = ("after", "requests", "arrays", "resident", "prefixes", "open files", "threads")
    return Table("A soak of the engine", note, header, rows)


def _ask_until(engine: Engine, requests: Iterator[int], until: float) -> None:
    """Ask one random thing after the other, and go away from some answers."""
    while time.monotonic() < until:
        rng = random.Random(number := next(requests))
        ids = [rng.randrange(3, 6)] * rng.randrange(1, 200) + [rng.randrange(3, 600) for _ in range(rng.randrange(60))]
        one = request(
            engine.model,
            ids,
            max_tokens=rng.randrange(1, 80),
            drafts=rng.choice((None, None, 0, 3)),
            sampling=SamplingParameters(temperature=rng.choice((0, 1)), top_k=20),
            seed=number,
        )
        leaves_at = rng.randrange(1, 40) if rng.random() < 1 / 3 else None
        engine.submit(one)
        for emission in engine.stream(one):
            if emission.number == leaves_at:
                engine.cancel(one)
                break


def _held(engine: Engine, requests: int) -> Held:
    assert engine.prefixes is not None, "the engine was made with some"
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(list(Path("/proc/self/fd").iterdir()))
    # The states of what was cancelled are freed by the engine's next step.
    time.sleep(1)
    return Held(requests, mx.get_active_memory(), resident, engine.prefixes.nbytes, files, threading.active_count())


def _shown(held: Held) -> list[str]:
    return [str(held.requests), *(str(value >> 20) for value in held[1:4]), *map(str, held[4:])]
