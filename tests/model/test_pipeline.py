"""Layers that ranks run one after the other: the same answers, and as many of them on each as it has room for."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import ShardingError
from mlx_qwen.loading import load_model, plan_model
from mlx_qwen.model.pipeline import Bytes, stages_of, stored_bytes
from tests.support.checkpoints import KINDS
from tests.support.ranks import in_processes, in_threads

Checkpoint = Callable[..., Path]
TOLERANCE = 2e-4


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", [*KINDS, "demo"])
def test_ranks_with_whole_layers_compute_what_one_does(
    checkpoint: Checkpoint, kind: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = demo_folder() if kind == "demo" else checkpoint(kind, with_mtp=True)
    config = ModelConfig.from_directory(path)
    prompt = mx.array(np.random.default_rng(0).integers(0, 299, (2, 37)))

    def answer(group: Any) -> tuple[np.ndarray, list[int], np.ndarray]:
        model = load_model(path, config, dtype=mx.float32, group=group, pipeline=True)
        cache, tokens = model.make_cache(), []
        stepped = model.step(prompt[:1], cache.state, last=True)
        logits, cache.state = model.logits(stepped.hidden), stepped.state
        for _ in range(8):
            tokens.append(int(mx.argmax(logits[0, -1])))
            logits = model(mx.array([tokens[-1:]]), cache)
        drafts = model.mtp_logits(model.hidden_states(prompt[:1]), prompt[:1])
        return np.array(model(prompt)), tokens, np.array(drafts)

    expected, tokens, drafts = answer(None)
    for logits, written, drafted in in_threads(count, answer, monkeypatch):
        assert np.abs(logits - expected).max() <= TOLERANCE * np.abs(expected).max()
        assert np.abs(drafted - drafts).max() <= TOLERANCE * np.abs(drafts).max()
        assert written == tokens


_RING = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
group = mx.distributed.init(strict=True, backend="ring")
folder = Path(sys.argv[1])
model = load_model(folder, ModelConfig.from_directory(folder), dtype=mx.float32, group=group, pipeline=True)
cache = model.make_cache()
model(mx.array([[5, 9, 17]]), cache)
logits = model(mx.array([[33, 2]]), cache)
for _ in range(4):
    token = int(mx.argmax(logits[0, -1]))
    print(token, *logits[0, -1].tolist())
    logits = model(mx.array([[token]]), cache)
"""


def test_processes_on_a_ring_run_layers_one_after_the_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = checkpoint("moe")
    model = load_model(path, ModelConfig.from_directory(path))
    cache = model.make_cache()
    logits = model(mx.array([[5, 9, 17, 33, 2]]), cache)
    first, second = in_processes(2, _RING, path, folder=tmp_path)
    assert first == second
    for line in first.splitlines():
        token, *theirs = map(float, line.split())
        own = np.array(logits[0, -1])
        assert np.abs(np.array(theirs) - own).max() <= TOLERANCE * np.abs(own).max()
        assert int(token) == int(own.argmax())
        logits = model(mx.array([[int(token)]]), cache)


def test_layers_are_divided_so_that_the_fullest_rank_is_as_empty_as_can_be() -> None:
    stored, usable = Bytes((5, 3, 8, 1, 1, 9, 2, 4), head=6, common=2), (40, 10, 30)

    def fullness(ends: tuple[int, ...]) -> float:
        spans = zip((0, *ends), (*ends, 8), strict=True)
        held = [2 + sum(stored.layers[a:b]) + (6 if b == 8 else 0) for a, b in spans]
        return max(h / u for h, u in zip(held, usable, strict=True))

    spans = stages_of(stored, usable)
    assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]
    assert fullness(tuple(last for _, last in spans[:-1])) == min(map(fullness, combinations(range(1, 8), 2)))


def test_layers_that_do_not_fit_are_refused_before_loading() -> None:
    with pytest.raises(ShardingError, match="The layers do not fit: 2 ranks need"):
        stages_of(Bytes((10, 10), head=1, common=1), (11, 5))
    with pytest.raises(ShardingError, match="3 ranks are more than the model has layers, 2"):
        stages_of(Bytes((10, 10), head=1, common=1), (100, 100, 100))


@pytest.mark.parametrize("fused", [False, True])
def test_the_bytes_of_layers_are_those_of_the_files(checkpoint: Checkpoint, fused: bool) -> None:
    path = checkpoint("moe", fused_experts=fused)
    config = ModelConfig.from_directory(path)
    plan = plan_model(path, config)
    stored = stored_bytes(plan.targets, config.text.num_hidden_layers)
    tensors = {source.tensor.name: source.tensor.nbytes for target in plan.targets for source in target.sources}
    assert sum(stored.layers) + stored.head + stored.common == sum(tensors.values())
