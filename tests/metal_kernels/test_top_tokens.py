"""The best few tokens of logits, through the emulator, beside their reference and NumPy's stable sort."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.greedy import Top, op, reference, top_tokens
from mlx_qwen.bench.as_on_gpu import as_on_gpu, weightless
from mlx_qwen.bench.graph import count_nodes
from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.loading import load_model
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import DRAWN, prompt, sequence, written
from tests.metal_emulator import emulated
from tests.metal_emulator.launch import Order

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
RNG = np.random.default_rng
KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "random": lambda x: x,
    "tied": np.round,
    "flat": lambda x: 0 * x,
    "both zeros": lambda x: np.where(RNG(1).random(x.shape) < 0.5, 0.0, -0.0),
    "mostly banned": lambda x: np.where(RNG(1).random(x.shape) < 0.9, -np.inf, np.round(x)),
    "all banned": lambda x: np.full(x.shape, -np.inf),
    "no numbers": lambda x: np.where(RNG(1).random(x.shape) < 0.9, np.nan, np.round(x)),
    "infinite": lambda x: np.where(RNG(1).random(x.shape) < 0.1, np.inf, x),
}


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def random_logits(n: int, V: int, kind: str = "random") -> np.ndarray:
    return KINDS[kind](RNG(0).normal(0, 4, (n, V))).astype(np.float32)


def check(found: Top, logits: np.ndarray, k: int) -> None:
    """Tokens and logits are equal to NumPy's, which sorts NaN last; the sum is near that in fp64."""
    tokens = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    assert [x.dtype for x in found] == [mx.uint32, mx.float32, mx.float32]
    np.testing.assert_array_equal(np.array(found.tokens), tokens)
    np.testing.assert_array_equal(np.array(found.scores), np.take_along_axis(logits, tokens, -1))
    with np.errstate(all="ignore"):
        total = np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(found.total, total, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("V", "k"), [(8, 1), (31, 20), (320, 64), (2047, 40), (40_001, 20)])
def test_tokens_are_the_first_of_a_stable_sort(kind: str, V: int, k: int) -> None:
    logits = random_logits(3, V, kind)
    with emulated() as report:
        found = top_tokens(mx.array(logits), k)
        mx.eval(found)
    assert report.count() == 2
    assert stats() == {"top_tokens": OpStats(kernel=1)}
    check(found, logits, k)


@pytest.mark.parametrize(("kind", "k"), [("random", 1), ("random", 20), ("tied", 40), ("flat", 20), ("random", 64)])
def test_the_whole_vocabulary_is_ranked_in_two_launches_that_read_it_once(kind: str, k: int) -> None:
    logits = random_logits(1, 248_320, kind)
    with emulated() as report:
        found = top_tokens(mx.array(logits), k)
        mx.eval(found)
    check(found, logits, k)
    moved = sum(buffer.read + buffer.written for launch in report.launches for buffer in launch.buffers.values())
    assert moved <= 1.1 * logits.nbytes


@pytest.mark.parametrize("order", get_args(Order))
@pytest.mark.parametrize("kind", ["tied", "no numbers"])
def test_no_order_of_threads_changes_anything(kind: str, order: Order) -> None:
    logits = random_logits(2, 5001, kind)
    with emulated(checked=True, order=order):
        found = top_tokens(mx.array(logits), 20)
        mx.eval(found)
    check(found, logits, 20)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_short_types_are_ranked_as_what_they_hold(dtype: mx.Dtype) -> None:
    logits = mx.array(random_logits(2, 9000)).astype(dtype)
    with emulated():
        found = top_tokens(logits, 20)
        mx.eval(found)
    check(found, np.array(logits.astype(mx.float32)), 20)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_takes_the_same_by_a_partition_and_by_a_sort(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(3, 700, kind)
    for k in (1, 20, 100, 699, 700):
        tokens = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
        np.testing.assert_array_equal(np.array(reference.top_tokens(mx.array(logits), k).tokens), tokens)
        with monkeypatch.context() as as_on_a_gpu:
            as_on_a_gpu.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
            found = reference.top_tokens(mx.array(logits), k).tokens
        np.testing.assert_array_equal(np.array(found), tokens)


@pytest.mark.parametrize(("V", "k"), [(700, 65), (700, 700), (6, 3)])
def test_more_tokens_than_the_kernels_rank_are_the_references(V: int, k: int) -> None:
    logits = random_logits(2, V)
    with emulated() as report:
        found = top_tokens(mx.array(logits), k)
        mx.eval(found)
    assert report.count() == 0
    np.testing.assert_array_equal(np.array(found.tokens), np.argsort(-logits, axis=-1, kind="stable")[:, :k])


def launches(top_logprobs: int) -> Counter[str]:
    """Of a token's choice from 248,320 logits, as Qwen recommends to draw it."""
    V, how = 248_320, SamplingParameters(temperature=1.0, top_k=20, top_p=0.95, presence_penalty=1.5)
    sampler = TokenSampler(how, prompt=mx.array([0]), vocab_size=V, seed=1, top_logprobs=top_logprobs)
    history = sampler.start()._replace(present=weightless((1, V), mx.float32))
    logits = weightless((1, V), mx.bfloat16)
    with as_on_gpu() as counted:
        return count_nodes(lambda: list(sampler.choose(logits, history).chosen.arrays()), counted)


def test_a_drawn_choice_sorts_nothing_and_costs_the_launches_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, named = launches(0), launches(5)
    for found in (drawn, named):
        assert not {"ArgSort", "ArgPartition", "Sort", "Partition", "LogSumExp"} & found.keys()
        assert found["mlx_qwen_top_of_parts"] == found["mlx_qwen_top_of_all"] == 1
    monkeypatch.setattr(op, "takes_kernel", lambda *_: False)
    plain, plainly_named = launches(0), launches(5)
    page = PAGE.read_text(encoding="utf-8")
    assert f"| kernels | {drawn.total()} | {named.total()} |" in page
    assert f"| plain MLX | {plain.total()} | {plainly_named.total()} |" in page


@pytest.mark.parametrize("depth", [0, 3])
def test_a_drawn_answer_through_the_kernels_is_that_of_plain_mlx(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path], depth: int
) -> None:
    path = checkpoint("dense", with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))

    def answers() -> list[list[tuple[int, object]]]:
        rows = [sequence(model, prompt(seed), depth, DRAWN, count=8, top_logprobs=3) for seed in (1, 2)]
        found = written(Engine(model), *rows)
        return [[(one.token, one.choice.top[0].tolist()) for one in each] for each in found]

    with emulated():
        found = answers()
    assert stats()["top_tokens"].kernel > 0
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    assert found == answers()
