"""Minutes of random requests through one engine: what it holds has to stay where it was, and every answer its own."""

import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx

from mlx_qwen.bench.table import Table
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters
from tools.benchmarks.stepping import request

_PREFIX_BYTES = 8 << 20
_CLIENTS = 6
# How many different things are asked, each of which is answered alone once before.
_DIFFERENT = 100
_HEADER = ("after", "requests", "equal", "active", "cached", "resident", "prefixes", "open files", "threads")


class Held(NamedTuple):
    """What the process held at one time; bytes but for the counts."""

    active: int
    cached: int
    resident: int
    prefixes: int
    files: int
    threads: int


class Heard(NamedTuple):
    """How many requests a client has asked, and how many answers, as far as it listened, were those given alone."""

    asked: int
    equal: int


def bench_soak(minutes: float) -> Table:
    """Requests that join, leave and are cancelled, with drafts and prefixes, on the bundled model; a line a minute."""
    folder = demo_folder()
    model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32)
    mx.eval(model.parameters())
    alone = [_answer(Engine(model), _asked(model, which, drafts=0)) for which in range(_DIFFERENT)]
    engine, requests, rows = Engine(model, prefixes=PrefixIndex(_PREFIX_BYTES)), count(), []
    asked = equal = 0
    started = time.monotonic()
    click.echo("  ".join(_HEADER), err=True)
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for line in range(1, max(1, round(minutes)) + 1):
            until = started + min(60 * line, 60 * minutes)
            for client in [clients.submit(_ask_until, engine, alone, requests, until) for _ in range(_CLIENTS)]:
                heard = client.result()
                asked, equal = asked + heard.asked, equal + heard.equal
            passed = f"{(time.monotonic() - started) / 60:.1f} min"
            rows.append((passed, f"{asked:,}", f"{equal:,}", *_shown(_held(engine))))
            click.echo("  ".join(rows[-1]), err=True)
    note = (
        f"{_CLIENTS} clients of the bundled model in fp32, greedy or drawn, with drafts or without, a third of whose "
        f"answers are left early, prefixes within {_PREFIX_BYTES >> 20} MiB; nobody asks while a line is taken. Equal: "
        "to the answer of an engine of its own without drafts and prefixes. Memory in MiB; active and cached are MLX's."
    )
    return Table("A soak of the engine", note, _HEADER, rows)


def _asked(model: Model, which: int, *, drafts: int | None) -> Sequence:
    """One of the things that are asked."""
    rng = random.Random(which)
    ids = [rng.randrange(3, 6)] * rng.randrange(1, 200) + [rng.randrange(3, 600) for _ in range(rng.randrange(60))]
    sampling = SamplingParameters(temperature=rng.choice((0, 1)), top_k=20)
    return request(model, ids, max_tokens=rng.randrange(1, 80), drafts=drafts, sampling=sampling, seed=which)


def _answer(engine: Engine, one: Sequence) -> list[int]:
    one.key = None
    engine.submit(one)
    return [emission.token for emission in engine.stream(one)]


def _ask_until(engine: Engine, alone: list[list[int]], requests: Iterator[int], until: float) -> Heard:
    """Ask one random thing after the other, and go away from some answers."""
    asked = equal = 0
    while time.monotonic() < until:
        rng = random.Random(f"request {next(requests)}")
        which = rng.randrange(_DIFFERENT)
        one = _asked(engine.model, which, drafts=rng.choice((None, None, 0, 3)))
        leaves_at = rng.randrange(1, 40) if rng.random() < 1 / 3 else None
        heard: list[int] = []
        engine.submit(one)
        for emission in engine.stream(one):
            heard.append(emission.token)
            if emission.number == leaves_at:
                engine.cancel(one)
                break
        expected = alone[which] if leaves_at is None else alone[which][:leaves_at]
        asked, equal = asked + 1, equal + (heard == expected)
    return Heard(asked, equal)


def _held(engine: Engine) -> Held:
    assert engine.prefixes is not None, "the engine was made with some"
    # The states of what was cancelled are freed by the engine's next step.
    time.sleep(1)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = len(list(Path("/proc/self/fd").iterdir()))
    arrays = mx.get_active_memory(), mx.get_cache_memory()
    return Held(*arrays, resident, engine.prefixes.nbytes, files, threading.active_count())


def _shown(held: Held) -> list[str]:
    return [*(f"{value / 2**20:.1f}" for value in held[:4]), *map(str, held[4:])]
