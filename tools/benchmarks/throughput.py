"""Tokens a second of answers that are written at the same time, beside mlx-lm's batches."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.engine.engine import Engine
from mlx_qwen.model import Model
from tools.benchmarks.peer import random_pair
from tools.benchmarks.small_model import small_config
from tools.benchmarks.stepping import computed, drained, request

_BATCHES = (1, 4, 16)
_TOKENS = 16
_PROMPT_TOKENS = 16


def bench_throughput(*, repeats: int = 3) -> Table:
    """Greedy answers to random prompts, both sides from the first step behind the prompts to the last."""
    ours, theirs = random_pair(small_config(8, hidden_size=256, intermediate_size=768, heads=8, head_dim=64))
    rows = []
    for size in _BATCHES:
        prompts = np.random.default_rng(size).integers(0, 1024, (size, _PROMPT_TOKENS)).tolist()
        seconds = _seconds({OURS: partial(_ours, ours, prompts), PEER: partial(_theirs, theirs, prompts)}, repeats)
        each = {name: size * _TOKENS / median(turn.passed for turn in turns) for name, turns in seconds.items()}
        pairs = list(zip(seconds[OURS], seconds[PEER], strict=True))
        ratios = (
            median(peer.passed / own.passed for own, peer in pairs),
            min(turn.passed for turn in seconds[PEER]) / min(turn.passed for turn in seconds[OURS]),
            median(peer.computed / own.computed for own, peer in pairs),
        )
        rows.append((f"B = {size}", f"{each[OURS]:.1f}", f"{each[PEER]:.1f}", *(f"{ratio:.2f}" for ratio in ratios)))
    note = (
        f"8 layers of width 256 with equal random weights, fp32; {_TOKENS} tokens behind prompts of {_PROMPT_TOKENS}, "
        f"tokens a second of all answers, medians of {repeats} turns in alternation. Ratios: within one turn, of the "
        "quickest turns, and of the processor's time within one turn, which what else runs here hardly changes."
    )
    return Table("Answers at the same time", note, ("", OURS, PEER, "ratio", "quickest", "processor"), rows)


class Seconds(NamedTuple):
    """How long a turn took, and how long the process computed for it, all its threads together."""

    passed: float
    computed: float


class _Watch:
    def __init__(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def seconds(self) -> Seconds:
        passed, computing = self._started
        return Seconds(time.perf_counter() - passed, time.process_time() - computing)


def _seconds(candidates: Mapping[str, Callable[[], Seconds]], repeats: int) -> dict[str, list[Seconds]]:
    """What each measures of itself in turn, after one turn that does not count."""
    turns = [{name: run() for name, run in candidates.items()} for _ in range(repeats + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in candidates}


def _ours(model: Model, prompts: list[list[int]]) -> Seconds:
    """Seconds for the tokens behind the first of each answer."""

    def run() -> Seconds:
        engine = Engine(model)
        sequences = [request(model, ids, max_tokens=_TOKENS + 8) for ids in prompts]
        for sequence in sequences:
            engine.submit(sequence)
        # Answers that begin earlier write while later prompts are read; only steps of all of them are timed.
        while any(len(sequence.written) == 0 for sequence in sequences):
            engine.step()
            for sequence in sequences:
                drained(sequence)
        for sequence in sequences:
            sequence.max_tokens = len(sequence.written) + _TOKENS + 1
        watch = _Watch()
        tokens = 0
        while tokens < _TOKENS * len(sequences):
            engine.step()
            tokens += sum(drained(sequence) for sequence in sequences)
        seconds = watch.seconds()
        for sequence in sequences:
            engine.cancel(sequence)
        engine.step()
        return seconds

    return computed(run)


def _theirs(model: Any, prompts: list[list[int]]) -> Seconds:
    """Seconds for as many tokens of mlx-lm's batch."""
    from mlx_lm.generate import BatchGenerator

    batch = BatchGenerator(model, max_tokens=_TOKENS + 8, prefill_batch_size=len(prompts))
    batch.insert(prompts)
    while not batch.next_generated():
        pass
    watch = _Watch()
    tokens = 0
    while tokens < _TOKENS * len(prompts):
        tokens += len(batch.next_generated())
    seconds = watch.seconds()
    batch.close()
    mx.synchronize()
    return seconds
