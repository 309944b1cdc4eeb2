"""Penalties, biases and XTC do to logits what mlx-lm's own processors do."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_xtc, make_logits_processors

from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.recommended import SamplingParameters
from tests.engine.conftest import Loaded
from tests.engine.test_sampling import V, random_logits

WRITTEN = [3, 7, 3, 3, 50, 7]


def scores_after(written: list[int], parameters: SamplingParameters, **options: object) -> np.ndarray:
    sampler = TokenSampler(parameters, prompt=mx.array([0, 1]), vocab_size=V, **options)  # type: ignore[arg-type]
    history = sampler.start()
    for token in written:
        history = sampler.saw(history, mx.array([token]))
    return np.array(sampler.choose(mx.array(random_logits(1)), history).scores)


@pytest.mark.parametrize(
    ("parameters", "bias"),
    [
        ({"frequency_penalty": 0.7}, None),
        ({"frequency_penalty": -1.5, "presence_penalty": 0.5}, None),
        ({"frequency_penalty": 2.0, "presence_penalty": -2.0}, None),
        ({}, {3: 5.0, 199: -100.0}),
        ({"frequency_penalty": 1.0}, {7: -3.5}),
    ],
    ids=str,
)
def test_penalties_and_biases_equal_mlx_lms(parameters: dict[str, float], bias: dict[int, float] | None) -> None:
    expected = mx.array(random_logits(1))
    for process in make_logits_processors(
        bias,
        **parameters,
        presence_context_size=99,
        frequency_context_size=99,  # type: ignore[arg-type]
    ):
        expected = process(mx.array(WRITTEN), expected)
    found = scores_after(WRITTEN, SamplingParameters(0.0, **parameters), logit_bias=bias)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)


def candidates_after_xtc(temperature: float, probability: float, spared: list[int], *, top_k: int = 0) -> np.ndarray:
    """Which of all tokens can be drawn, bool [V]."""
    parameters = SamplingParameters(temperature, top_k=top_k, xtc_probability=probability, xtc_threshold=0.05)
    sampler = TokenSampler(parameters, prompt=mx.array([0]), vocab_size=V, seed=1, spared_by_xtc=spared)
    drawn, history = set(), sampler.start()
    for _ in range(400):
        token = sampler.choose(mx.array(random_logits(4)), history).token
        history = sampler.saw(history, token)
        drawn.add(int(token.item()))
    return np.array([token in drawn for token in range(V)])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("top_k", [0, 150])
@pytest.mark.parametrize("spares", [False, True], ids=["none spared", "the likeliest spared"])
def test_xtc_leaves_out_the_tokens_that_mlx_lms_does(temperature: float, top_k: int, spares: bool) -> None:
    logits = mx.array(random_logits(4))
    spared = [int(mx.argmax(logits).item())] if spares else []
    kept = np.array(apply_xtc(logits, 1.0, 0.05, spared))[0] > -np.inf
    assert 0 < (~kept).sum() < 20
    drawn = candidates_after_xtc(temperature, 1.0, spared, top_k=top_k)
    assert not drawn[~kept].any()
    likeliest = np.argmax(np.where(kept, np.array(logits)[0], -np.inf))
    assert drawn[likeliest]


def test_xtc_happens_as_often_as_it_is_asked_to() -> None:
    logits = mx.array(random_logits(4))
    likeliest = int(mx.argmax(logits).item())
    share = {}
    for probability in (0.0, 0.5):
        parameters = SamplingParameters(0.3, xtc_probability=probability, xtc_threshold=0.05)
        sampler = TokenSampler(parameters, prompt=mx.array([0]), vocab_size=V, seed=2)
        history, hits = sampler.start(), 0
        for _ in range(600):
            token = sampler.choose(logits, history).token
            history = sampler.saw(history, token)
            hits += int(token.item()) == likeliest
        share[probability] = hits / 600
    assert share[0.5] == pytest.approx(share[0.0] / 2, abs=0.08)


def test_a_biased_token_is_written_or_never(loaded: Loaded) -> None:
    forced = [
        one.token
        for one in stream_generate(
            loaded.model, loaded.processor, "a", max_tokens=5, logit_bias={65: 100}, temperature=0
        )
    ]
    assert forced == [65] * 5
    first = next(stream_generate(loaded.model, loaded.processor, "a", max_tokens=1, temperature=0)).token
    other = next(
        stream_generate(loaded.model, loaded.processor, "a", max_tokens=1, temperature=0, logit_bias={first: -100})
    ).token
    assert other != first


def test_a_bias_outside_of_the_vocabulary_is_refused_by_its_token(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match=r"logit_bias names token 10000000; this vocabulary ends with"):
        generate(loaded.model, loaded.processor, "a", logit_bias={10_000_000: 1})
