"""The best token of logits, through the emulator, beside its reference and NumPy."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.greedy import best_tokens, reference
from mlx_qwen.bench.as_on_gpu import as_on_gpu, weightless
from mlx_qwen.bench.graph import count_nodes
from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.loading import load_model
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import GREEDY, PENALIZED, prompt, sequence, tokens, written
from tests.metal_emulator import emulated

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def random_logits(n: int, V: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 4, (n, V)).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "V"), [(1, 8), (2, 31), (3, 320), (1, 2047), (2, 40_001), (1, 248_320)])
def test_tokens_are_those_of_the_reference_and_sums_those_of_fp64(n: int, V: int, dtype: mx.Dtype) -> None:
    logits = random_logits(n, V, dtype)
    with emulated() as report:
        found = best_tokens(logits)
        mx.eval(found)
    assert report.count() == 2
    assert stats() == {"best_tokens": OpStats(kernel=1)}
    expected = reference.best_tokens(logits)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]
    assert found.tokens.tolist() == expected.tokens.tolist()
    exact = np.array(logits.astype(mx.float32)).astype(np.float64)
    total = np.log(np.exp(exact).sum(-1))
    np.testing.assert_allclose(np.array(found.total)[:, 0], total, rtol=1e-6)
    np.testing.assert_allclose(found.logprobs, exact.max(-1) - total, rtol=1e-6, atol=1e-6 * np.abs(total).max())


@pytest.mark.parametrize("places", [(5, 6), (0, 319), (33, 65), (255, 256), (4095, 4096), (20_000, 39_999)], ids=str)
def test_of_equal_logits_the_lowest_id_is_taken(places: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(0, 1, (1, 40_000)).astype(np.float32)
    values[0, list(places)] = 9
    with emulated():
        assert best_tokens(mx.array(values)).tokens.tolist() == [places[0]]
    flat = mx.zeros((2, 5000))
    with emulated():
        assert best_tokens(flat).tokens.tolist() == [0, 0]


def test_what_is_no_number_is_never_taken_and_makes_no_number_of_the_row() -> None:
    values = np.array(random_logits(4, 9000))
    best = values.argmax(-1).tolist()
    values[1, 17], values[2, :] = np.nan, -np.inf
    values[3, 4096:8192] = np.nan
    best[3] = int(np.nanargmax(values[3]))
    with emulated():
        found = best_tokens(mx.array(values))
        mx.eval(found)
    assert found.tokens.tolist() == [best[0], best[1], 0, best[3]]
    assert np.isnan(np.array(found.logprobs)).tolist() == [False, True, True, True]
    masked = values[:1].copy()
    masked[0, 100:] = -np.inf
    with emulated():
        found = best_tokens(mx.array(masked))
        mx.eval(found)
    assert found.tokens.item() == masked[0].argmax()
    np.testing.assert_allclose(found.total.item(), np.log(np.exp(masked[0, :100].astype(np.float64)).sum()), rtol=1e-6)


def test_a_greedy_choice_costs_two_launches_and_reads_the_logits_once() -> None:
    V = 248_320
    sampler = TokenSampler(SamplingParameters(temperature=0), prompt=mx.array([0]), vocab_size=V)
    logits, history = weightless((1, V), mx.bfloat16), sampler.start()

    def launches() -> Counter[str]:
        with as_on_gpu() as counted:
            return count_nodes(lambda: list(sampler.choose(logits, history).chosen.arrays()), counted)

    joined = launches()
    assert joined.total() == 2
    with emulated() as report:
        mx.eval(best_tokens(random_logits(1, V, mx.bfloat16)))
    moved = sum(buffer.read + buffer.written for launch in report.launches for buffer in launch.buffers.values())
    assert moved <= 1.02 * 2 * V


@pytest.mark.parametrize("depth", [0, 3])
def test_an_answer_through_the_kernels_is_that_of_plain_mlx(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Callable[..., Path], depth: int
) -> None:
    path = checkpoint("dense", with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))

    def answers() -> list[list[int]]:
        rows = [
            sequence(model, prompt(1), depth, GREEDY, count=6),
            sequence(model, prompt(2), depth, PENALIZED, count=6),
        ]
        return [tokens(each) for each in written(Engine(model), *rows)]

    with emulated():
        found = answers()
    assert stats()["best_tokens"].kernel > 0
    monkeypatch.setenv("MLX_QWEN_KERNELS", "reference")
    assert found == answers()
