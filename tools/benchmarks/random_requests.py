"""Random requests that share an engine, join, leave and go on from each other, each beside its solo run."""

import random
import time
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.emission import Emission
from mlx_qwen.engine.engine import Engine, Limits
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters
from tools.benchmarks.stepping import request

_GREEDY = SamplingParameters(temperature=0)
_DRAWN = SamplingParameters(temperature=1.0, top_k=20, presence_penalty=1.0)
_MOST_AT_ONCE = 8


class Outcome(NamedTuple):
    """How many were asked, cancelled and went on from what was read; and the numbers of those that differ."""

    asked: int
    cancelled: int
    reused: int
    drafted: int
    differing: list[int]


class _Asked(NamedTuple):
    number: int
    sequence: Sequence
    stream: Iterator[Emission]
    expected: list[int]
    leaves_at: int


def bench_requests(count: int) -> Table:
    """`count` random requests of the bundled model."""
    folder = demo_folder()
    model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32)
    started = time.monotonic()
    found = ask_randomly(model, count)
    note = (
        "Up to 8 at a time in 5 rows of the bundled model in fp32, where no two tokens tie by rounding: greedy or "
        "drawn, pieces of any size, drafts or none, prefixes kept or not, a third left early; each is compared with "
        "an engine of its own without drafts and prefixes."
    )
    header = (
        "requests",
        "left early",
        "went on from a prefix",
        "tokens from drafts",
        "differ from their solo run",
        "s",
    )
    parts = (*found[:4], len(found.differing), round(time.monotonic() - started))
    return Table("Random requests", note, header, [tuple(f"{part:,}" for part in parts)])


def ask_randomly(model: Model, count: int, *, seed: int = 0, seconds: float = float("inf")) -> Outcome:
    """Ask `count` requests, or as many as `seconds` allow, and compare each with its solo run."""
    rng, until = random.Random(seed), time.monotonic() + seconds
    engine = Engine(model, Limits(most_rows=5), prefixes=PrefixIndex(3 << 20))
    vocabulary = min(299, model.config.text.vocab_size)
    prompts = [_ids(number, rng.choice([3, 17, 40, 90]), vocabulary) for number in range(6)]
    known: dict[tuple[object, ...], list[int]] = {}
    waiting: list[_Asked] = []
    done: list[tuple[_Asked, int, bool]] = []
    number = 0
    while number < count and time.monotonic() < until:
        prompt = [*rng.choice(prompts)[: rng.randrange(1, 60)], *_ids(number % 7, rng.randrange(4), vocabulary)]
        waiting.append(_submitted(engine, rng, prompt, number, known))
        number += 1
        while len(waiting) > rng.randrange(_MOST_AT_ONCE):
            done.append(_read(waiting.pop(rng.randrange(len(waiting)))))
    done += [_read(one) for one in waiting]
    return Outcome(
        number,
        sum(one.leaves_at < len(one.expected) for one, _, _ in done),
        sum(one.sequence.cached > 0 for one, _, _ in done),
        sum(drafted for _, drafted, _ in done),
        [one.number for one, _, same in done if not same],
    )


def _submitted(
    engine: Engine, rng: random.Random, prompt: list[int], number: int, known: dict[tuple[object, ...], list[int]]
) -> _Asked:
    how, most = rng.choice([_GREEDY, _DRAWN]), rng.randrange(1, 14)
    what = (tuple(prompt), how, most)
    if what not in known:
        alone = request(engine.model, prompt, max_tokens=most, sampling=how, seed=3)
        alone.key = None
        known[what] = [emission.token for emission in _streamed(Engine(engine.model), alone)]
    one = request(engine.model, prompt, max_tokens=most, drafts=rng.choice([0, 2, 5, None]), sampling=how, seed=3)
    one.key = one.key if rng.random() < 0.8 else None
    one.step_size = rng.choice([7, 32, 2048])
    one.anchors = sorted({rng.randrange(1, len(prompt) + 1) for _ in range(2)})
    stream = _streamed(engine, one)
    leaves_at = rng.randrange(1, most + 1) if rng.random() < 1 / 3 else most
    return _Asked(number, one, stream, known[what], leaves_at)


def _streamed(engine: Engine, one: Sequence) -> Iterator[Emission]:
    engine.submit(one)
    return engine.stream(one)


def _read(one: _Asked) -> tuple[_Asked, int, bool]:
    """A request, how many of its tokens came from drafts, and whether all are those of its solo run."""
    emissions = [emission for emission, _ in zip(one.stream, range(one.leaves_at), strict=False)]
    close = getattr(one.stream, "close", None)
    if close is not None:
        close()
    same = [emission.token for emission in emissions] == one.expected[: one.leaves_at]
    return one, sum(emission.from_draft for emission in emissions), same


def _ids(seed: int, count: int, vocabulary: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(3, vocabulary, count).tolist()
    return ids
