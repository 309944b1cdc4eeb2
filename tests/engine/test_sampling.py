"""Sampling keeps the tokens, and gives them the probabilities, that transformers' own processors do."""

import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mlx_qwen.engine.drawing import Place, drawn, truncated
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.recommended import SamplingParameters

V = 200


def random_logits(seed: int, size: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (1, size)).astype(np.float32)


def probabilities(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    scores, tokens = truncated(mx.array(logits), parameters)
    kept = np.array(mx.softmax(scores, axis=-1))
    if tokens is None:
        return kept
    result = np.zeros_like(logits)
    np.put_along_axis(result, np.array(tokens).astype(np.int64), kept, axis=-1)
    return result


def reference_probabilities(logits: np.ndarray, parameters: SamplingParameters) -> np.ndarray:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(parameters.temperature)])
    if parameters.top_k:
        warpers.append(TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1:
        warpers.append(TopPLogitsWarper(parameters.top_p))
    if parameters.min_p:
        warpers.append(MinPLogitsWarper(parameters.min_p))
    return torch.softmax(warpers(None, torch.from_numpy(logits.copy())), dim=-1).numpy()


def sampler(parameters: SamplingParameters, *, prompt: tuple[int, ...] = (0,), **options: object) -> TokenSampler:
    return TokenSampler(parameters, prompt=mx.array(prompt), vocab_size=V, **options)  # type: ignore[arg-type]


def draw(sampler: TokenSampler, logits: np.ndarray, count: int) -> list[int]:
    drawn, history = [], sampler.start()
    for _ in range(count):
        token = sampler.choose(mx.array(logits), history).token
        history = sampler.saw(history, token)
        drawn.append(token.item())
    return drawn


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "parameters",
    [
        SamplingParameters(temperature=1.0),
        SamplingParameters(temperature=0.7, top_k=20),
        SamplingParameters(temperature=0.7, top_k=20, top_p=0.8),
        SamplingParameters(temperature=1.3, top_p=0.95),
        SamplingParameters(temperature=0.6, min_p=0.1),
        SamplingParameters(temperature=1.0, top_k=40, top_p=0.9, min_p=0.05),
        SamplingParameters(temperature=1.0, top_k=1),
        SamplingParameters(temperature=1.0, top_p=0.01),
        SamplingParameters(temperature=2.0, top_k=10**6, min_p=1.0),
    ],
    ids=str,
)
def test_truncation_equals_transformers(parameters: SamplingParameters, seed: int) -> None:
    logits = random_logits(seed)
    expected = reference_probabilities(logits, parameters)
    actual = probabilities(logits, parameters)
    np.testing.assert_array_equal(actual > 0, expected > 0)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_repetition_penalty_covers_prompt_and_answer_as_in_transformers() -> None:
    logits = random_logits(0)
    ours = sampler(SamplingParameters(temperature=0, repetition_penalty=1.3), prompt=(3, 5, 5))
    logprobs = ours.choose(mx.array(logits), ours.saw(ours.start(), mx.array([7]))).logprobs
    penalized = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[3, 5, 5, 7]]), torch.from_numpy(logits.copy()))
    np.testing.assert_allclose(np.array(logprobs), torch.log_softmax(penalized, -1).numpy(), atol=1e-5)


def test_presence_penalty_is_subtracted_once_from_every_token_of_the_answer_and_none_of_the_prompt() -> None:
    logits = random_logits(1)
    ours = sampler(SamplingParameters(temperature=0, presence_penalty=1.5), prompt=(3, 5))
    history = ours.start()
    for token in (7, 9, 7):
        history = ours.saw(history, mx.array([token]))
    choice = ours.choose(mx.array(logits), history)
    expected = logits.copy()
    expected[0, [7, 9]] -= 1.5
    np.testing.assert_allclose(
        np.array(choice.logprobs), torch.log_softmax(torch.from_numpy(expected), -1).numpy(), atol=1e-5
    )


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = random_logits(2)
    assert draw(sampler(SamplingParameters(temperature=0)), logits, 3) == [logits.argmax()] * 3


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    parameters = SamplingParameters(temperature=1.0, top_k=3)
    drawn = draw(TokenSampler(parameters, prompt=mx.array([0]), vocab_size=4, seed=1), logits, 2000)
    frequencies = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(frequencies, [5 / 9, 2.5 / 9, 1.5 / 9, 0], atol=0.04)


def test_a_seed_repeats_the_draws_whatever_else_uses_mx_random() -> None:
    logits, parameters = random_logits(3), SamplingParameters(temperature=1.5)
    first = draw(sampler(parameters, seed=11), logits, 20)
    mx.random.seed(5)
    mx.random.normal((3,))
    assert draw(sampler(parameters, seed=11), logits, 20) == first
    assert draw(sampler(parameters, seed=12), logits, 20) != first


@pytest.mark.parametrize("parameters", [SamplingParameters(1.0), SamplingParameters(1.0, top_k=V - 1)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_noise_is_mlxs_own_of_every_row_and_token(parameters: SamplingParameters, rows: int) -> None:
    places = [Place(seed, 4) for seed in range(rows)]
    digests = [blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for seed, number in places]
    keys = mx.array([[int.from_bytes(each[:4], "big"), int.from_bytes(each[4:], "big")] for each in digests], mx.uint32)
    noise = np.concatenate([np.array(mx.random.gumbel((1, V), key=key)) for key in keys])
    for seed in range(30):
        scores = np.random.default_rng(seed).normal(0, 0.1, (rows, V)).astype(np.float32)
        found = drawn(mx.array(scores), parameters, places, None, vocab_size=V)
        assert found.tolist() == (scores + noise).argmax(-1).tolist()


@pytest.mark.parametrize("parameters", [SamplingParameters(2.0, top_k=5), SamplingParameters(2.0, top_p=0.9)], ids=str)
@pytest.mark.parametrize("top", [2, 20])
def test_naming_the_likeliest_tokens_changes_no_draw(parameters: SamplingParameters, top: int) -> None:
    for seed in range(20):
        logits = random_logits(seed)
        plain = sampler(parameters, seed=seed)
        named = sampler(parameters, seed=seed, top_logprobs=top)
        choice = named.choose(mx.array(logits), named.start())
        assert choice.token.item() == plain.choose(mx.array(logits), plain.start()).token.item()
        tokens, logprobs = (np.array(each)[0] for each in choice.top)
        assert tokens.tolist() == np.argsort(-logits[0], kind="stable")[:top].tolist()
        np.testing.assert_allclose(logprobs, np.array(choice.logprobs)[0, tokens], atol=1e-6)


def test_without_a_seed_the_draws_follow_mx_random() -> None:
    logits, parameters = random_logits(3), SamplingParameters(temperature=1.5)
    mx.random.seed(5)
    first, second = (draw(sampler(parameters), logits, 20) for _ in range(2))
    mx.random.seed(5)
    assert draw(sampler(parameters), logits, 20) == first != second


def test_without_a_seed_answers_asked_for_in_several_threads_differ() -> None:
    parameters = SamplingParameters(temperature=1.5)
    with ThreadPoolExecutor(4) as threads:
        ready = threading.Barrier(4)
        seeds = list(threads.map(lambda _: (ready.wait(60), sampler(parameters).seed)[1], range(4)))
    assert len(set(seeds)) == 4


def test_a_callers_sampler_and_processors_replace_and_extend_the_built_in_ones() -> None:
    seen: list[list[int]] = []

    def forbid_best(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.where(logits == logits.max(), -mx.inf, logits)

    ours = sampler(
        SamplingParameters(temperature=0),
        prompt=(3, 5),
        sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        logits_processors=[forbid_best],
    )
    logits = random_logits(4)
    assert draw(ours, logits, 2) == [np.argsort(logits[0])[-2]] * 2
    assert seen == [[3, 5], [3, 5, np.argsort(logits[0])[-2]]]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_log_probabilities_are_computed_in_fp32(dtype: mx.Dtype) -> None:
    logits = mx.array(random_logits(5)).astype(dtype)
    ours = sampler(SamplingParameters(temperature=0))
    choice = ours.choose(logits, ours.start())
    exact = torch.log_softmax(torch.tensor(np.array(logits.astype(mx.float32))), -1).numpy()
    assert choice.logprobs.dtype == mx.float32
    np.testing.assert_allclose(np.array(choice.logprobs), exact, atol=1e-5)
