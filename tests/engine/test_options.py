"""Options that cannot be used are refused by name, and the others are completed as Qwen recommends."""

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import stream_generate
from mlx_qwen.options import GenerationOptions
from mlx_qwen.recommended import GREEDY, SamplingParameters, recommended_sampling
from mlx_qwen.requests import sampling_parameters
from tests.engine.conftest import Loaded, make_processor
from tests.support.configs import text_config

THINKING = SamplingParameters(1.0, top_p=0.95, top_k=20, presence_penalty=1.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.5),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
        ("thinking_budget", -1),
        ("seed", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 1),
        ("prompt_cache", []),
        ("prefill_step_size", 0),
        ("kv_bits", 3),
    ],
)
def test_an_impossible_value_is_refused_with_its_name(loaded: Loaded, name: str, value: object) -> None:
    with pytest.raises(PromptError, match=f"^{name} is "):
        stream_generate(loaded.model, loaded.processor, "hi", **{name: value})  # type: ignore[arg-type]


def test_a_sampler_beside_the_options_it_replaces_is_refused() -> None:
    with pytest.raises(PromptError, match=r"sampler replaces.*drop it or top_p"):
        GenerationOptions(sampler=lambda logprobs: logprobs.argmax(-1), top_p=0.5)


def test_kv_bits_beside_a_cache_is_refused(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match=r"model\.make_cache\(kv_bits"):
        GenerationOptions(kv_bits=8, prompt_cache=loaded.model.make_cache())


@pytest.mark.parametrize(
    ("hidden", "layers", "thinking", "expected"),
    [
        (1024, 24, False, SamplingParameters(1.0, top_k=20, presence_penalty=2.0)),
        (2048, 24, True, THINKING),
        (2560, 32, True, THINKING),
        (4096, 32, False, SamplingParameters(0.7, top_p=0.8, top_k=20, presence_penalty=1.5)),
    ],
)
def test_unset_sampling_takes_qwens_values_for_size_and_mode(
    hidden: int, layers: int, thinking: bool, expected: SamplingParameters
) -> None:
    text = ModelConfig.from_dict(text_config(hidden_size=hidden, num_hidden_layers=layers)).text
    assert GenerationOptions().sampling(recommended_sampling(text, thinking=thinking)) == expected


def test_what_the_caller_sets_wins_over_the_recommendation() -> None:
    options = GenerationOptions(temperature=0.3, top_k=5, presence_penalty=0)
    assert options.sampling(THINKING) == SamplingParameters(0.3, top_p=0.95, top_k=5)


def test_temperature_zero_brings_no_penalties_of_its_own() -> None:
    assert GenerationOptions(temperature=0).sampling(THINKING) == GREEDY
    assert GenerationOptions(temperature=0, presence_penalty=1).sampling(THINKING).presence_penalty == 1


def test_a_checkpoint_that_asks_for_greedy_decoding_gets_it_unless_a_temperature_is_set(loaded: Loaded) -> None:
    processor = make_processor(generation_config={"do_sample": False})
    chosen = [
        sampling_parameters(loaded.model, processor, options, thinking=True)
        for options in (GenerationOptions(), GenerationOptions(temperature=1.0))
    ]
    assert chosen == [GREEDY, THINKING]
