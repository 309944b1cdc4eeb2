"""Tokens a second and the time to the first one through HTTP, beside the peers' servers on the same checkpoint."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from tools.benchmarks.servers import VLM, Running, endless_demo, events, serving

_BATCHES = (1, 4, 16)
_TOKENS = 64
_WORDS = 40


class _Turn(NamedTuple):
    """All answers of one turn: tokens a second of the whole, and the median time to a first token in ms."""

    rate: float
    first: float


def bench_serving(folder: Path, *, repeats: int = 3, vlm: Path | None = None) -> Table:
    """Greedy answers at the same time, streamed to as many clients; `vlm` is the Python that has mlx-vlm, if any."""
    names = [OURS, PEER, *([VLM] if vlm is not None else [])]
    rows = []
    with ExitStack() as stack:
        model = endless_demo(folder)
        servers = {name: stack.enter_context(serving(name, model, "--temp", "0", vlm=vlm)) for name in names}
        for size in _BATCHES:
            turns = [
                {name: _turn(server, size, f"{size} {turn}") for name, server in servers.items()}
                for turn in range(repeats + 1)
            ][1:]
            rows.append(
                (f"B = {size}, tokens a second", *(_shown(turns, name, 0) for name in names), _ratio(turns, names))
            )
            rows.append(
                (f"B = {size}, first token, ms", *(_shown(turns, name, 1) for name in names), _ratio(turns, names, 1))
            )
    note = (
        f"The bundled model in fp32, kept from ending; chats of {_WORDS} words, each another, answers of {_TOKENS} "
        f"tokens, streamed; medians of {repeats} turns in alternation. The ratio is ours to the best peer's of "
        "the same turn."
    )
    return Table("Servers", note, ("", *names, "ratio"), rows)


def _turn(server: Running, size: int, salt: str) -> _Turn:
    with ThreadPoolExecutor(size) as clients:
        started = time.perf_counter()
        asked = [clients.submit(_ask, server, f"{salt} {client}") for client in range(size)]
        answers = [one.result() for one in asked]
        seconds = time.perf_counter() - started
    return _Turn(sum(tokens for tokens, _ in answers) / seconds, 1000 * median(first for _, first in answers))


def _ask(server: Running, salt: str) -> tuple[int, float]:
    """Tokens of an answer, and seconds until something of it was there."""
    prompt = f"{salt}: " + " ".join(str(number) for number in range(_WORDS))
    body = {
        "model": server.model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": _TOKENS,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens = time.perf_counter(), 0.0, 0
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=600) as answer:
        for event in events(answer.iter_lines()):
            choices, usage = event.get("choices"), event.get("usage")
            if not first and isinstance(choices, list) and choices and choices[0]["delta"].get("content"):
                first = time.perf_counter() - started
            if isinstance(usage, dict):
                tokens = usage["completion_tokens"]
    return tokens, first or time.perf_counter() - started


def _shown(turns: list[dict[str, _Turn]], name: str, field: int) -> str:
    return f"{median(turn[name][field] for turn in turns):.1f}"


def _ratio(turns: list[dict[str, _Turn]], names: list[str], field: int = 0) -> str:
    best = max if field == 0 else min
    return f"{median(turn[OURS][field] / best(turn[one][field] for one in names[1:]) for turn in turns):.2f}"
