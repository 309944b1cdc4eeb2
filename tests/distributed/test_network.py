"""What ranks send each other is counted as they send it, and what a network bounds follows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.planning import plan
from mlx_qwen.distributed.probe import Sum, network_of
from mlx_qwen.loading import load_model
from mlx_qwen.model.network import traffic
from tests.distributed.processes import ranks
from tests.support.ranks import in_threads

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_traffic_is_what_ranks_send_for_a_token(
    checkpoint: Checkpoint, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(kind)
    config = ModelConfig.from_directory(path)

    def sent(group: Any) -> list[tuple[str, int]]:
        model = load_model(path, config, dtype=mx.float32, group=group)
        cache = model.make_cache()
        mx.eval(model(mx.array([[5, 6, 7]]), cache))
        group.sent.clear()
        mx.eval(model(mx.array([[8]]), cache))
        return list(group.sent)

    said = traffic(config.text, item_size=4)
    for each in in_threads(2, sent, monkeypatch):
        assert each == [("gather", said.sum_bytes)] * said.sums + [("gather", said.logit_bytes // 2)]


@pytest.mark.parametrize("count", [2, 4])
def test_a_network_is_found_again_in_the_sums_that_it_would_take(count: int) -> None:
    latency, bandwidth = 2e-4, 4e9
    # Of two ranks each sends the other its part; of four, MLX's ring sums what is large in twice as many messages.
    steps, sent = (1, 1.0) if count == 2 else (2, 1.5)
    sums = [Sum(8, latency), Sum(1 << 26, steps * latency + sent * (1 << 26) / bandwidth)]
    found = network_of(sums, count)
    assert (found.latency, found.bandwidth) == pytest.approx((latency, bandwidth), rel=1e-3)


def test_a_plan_counts_the_network_in_where_it_is_told_of() -> None:
    told = plan("27B", ranks=2, latency=0.1, link=10.0)
    sums = 2 * 64 + 1
    expected = (sums + 1) * 1e-4 + (sums * 5120 * 2 + 248320 * 2 / 2) / 10e9
    assert told.network == pytest.approx(expected)
    assert f"{1e3 * expected:.2f} ms of waiting a token" in told.table()
    assert plan("27B", ranks=2).network is None
    assert plan("27B", latency=0.1).network is None


def test_the_doctor_measures_the_connection_and_only_rank_0_speaks() -> None:
    with ranks(2, "doctor", "--distributed") as started:
        assert started.ended(60) == [0, 0]
        said = started.out(0)
        assert started.out(1) == ""
    for words in ("ring (TCP)", "all_sum of 8,192 B", "GB/s", "129 sums a token", "mlx-qwen plan --ranks 2 --latency"):
        assert words in said
