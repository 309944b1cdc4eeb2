"""One rank of `round_trip`: what a token takes where no rank waits for another, and at each delay of the network."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median

import mlx.core as mx

from mlx_qwen.config import ModelConfig
from mlx_qwen.distributed.probe import network_of, sums
from mlx_qwen.loading import load_model
from mlx_qwen.model.network import traffic
from tools.benchmarks.far_hosts import Delay
from tools.benchmarks.one_rank import load_theirs, written
from tools.benchmarks.rings import join_sleeping

_PROMPT = mx.arange(32)[None]


def main(
    folder: Path, delay_file: Path, ranks: int, round_trips: list[float], turns: int, tokens: int, result: Path
) -> None:
    """Measure together with all other ranks, and write the medians in seconds as JSON, those of rank 0 count.

    `predicted` is the network's part of a token as `plan` has it, by the sums that were measured at the same delay.
    """
    cores = os.cpu_count() or 1
    if sys.platform == "linux":
        # As on a machine of its own: threads of a rank that wait busily take no core from another's.
        os.sched_setaffinity(0, {int(os.environ["MLX_RANK"]) % cores})
    group = join_sleeping() if ranks > cores else mx.distributed.init(strict=True, backend="ring")
    assert group is not None, "ranks have a number"
    config = ModelConfig.from_directory(folder)
    with _silence():
        silent = load_model(folder, config, group=group)
        written(silent, silent.make_cache(), _PROMPT, 2)
    ours, theirs = load_model(folder, config, group=group), load_theirs(folder, group)
    runs: dict[str, Callable[[], float]] = {
        "alone": lambda: written(silent, silent.make_cache(), _PROMPT, tokens)[0],
        "ours": lambda: written(ours, ours.make_cache(), _PROMPT, tokens)[0],
        "theirs": lambda: written(lambda ids, cache: theirs(ids, cache=cache), theirs.make_cache(), _PROMPT, tokens)[0],
    }
    sent = traffic(config.text, item_size=4)
    delay = Delay(delay_file)
    found: list[dict[str, list[float]]] = [{name: [] for name in (*runs, "sum", "predicted")} for _ in round_trips]
    for turn in range(turns + 1):
        for round_trip, times in zip(round_trips, found, strict=True):
            _together(group)
            if group.rank() == 0:
                delay.seconds = round_trip / 2
            _together(group)
            network = network_of(sums(group, (sent.sum_bytes, 1 << 20)), group.size())
            now = {"sum": network.latency, "predicted": sent.seconds(network, group.size())}
            for name, run in runs.items():
                with _silence() if name == "alone" else nullcontext():
                    now[name] = run()
                _together(group)
            for name, seconds in now.items():
                times[name] += [seconds] if turn else []
    medians = [{name: median(each) for name, each in times.items()} for times in found]
    result.write_text(json.dumps(medians), encoding="utf-8")


def _together(group: mx.distributed.Group) -> None:
    """Wait for all ranks."""
    mx.eval(mx.distributed.all_sum(mx.zeros(2), group=group))


@contextmanager
def _silence() -> Iterator[None]:
    """Let no rank wait for another: each takes its own part for those of all."""
    all_sum, all_gather = mx.distributed.all_sum, mx.distributed.all_gather

    def sum_of_own(x: mx.array, *, group: mx.distributed.Group) -> mx.array:
        return group.size() * x

    def own(x: mx.array, *, group: mx.distributed.Group) -> mx.array:
        return mx.concatenate([x] * group.size())

    mx.distributed.all_sum, mx.distributed.all_gather = sum_of_own, own  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.distributed.all_sum, mx.distributed.all_gather = all_sum, all_gather
