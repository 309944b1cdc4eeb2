"""Options that cannot be used are refused by name, and the others are completed as Qwen recommends."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.conversation import Conversation
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.generation import batch_generate, generate, stream_generate
from mlx_qwen.loading import load, load_model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.recommended import GREEDY, SamplingParameters, recommended_sampling
from mlx_qwen.requests import sampling_parameters
from mlx_qwen.settings import EngineSettings
from tests.engine.conftest import Loaded, make_processor
from tests.support.configs import text_config

THINKING = SamplingParameters(1.0, top_p=0.95, top_k=20, presence_penalty=1.5)


# Values that fit no use, and one of another type, for every option that can be wrong.
UNUSABLE: list[tuple[str, object]] = [
    ("max_tokens", 0),
    ("max_tokens", "5"),
    ("max_tokens", None),
    ("max_tokens", True),
    ("max_tokens", 5.0),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", "0"),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", [0.5]),
    ("top_k", -1),
    ("top_k", 2.5),
    ("min_p", 1.5),
    ("min_p", False),
    ("presence_penalty", 3.0),
    ("presence_penalty", "high"),
    ("frequency_penalty", -2.5),
    ("logit_bias", {5: 101}),
    ("logit_bias", {-1: 1}),
    ("logit_bias", {"a": 1}),
    ("logit_bias", [5]),
    ("xtc_probability", 1.5),
    ("tool_choice", 3),
    ("parallel_tool_calls", "yes"),
    ("schema", 3),
    ("response_format", {"type": "yaml"}),
    ("regex", 3),
    ("grammar", 3),
    ("close_loops", "yes"),
    ("reasoning_effort", "huge"),
    ("reasoning_effort", 3),
    ("chat_template_kwargs", {"messages": []}),
    ("chat_template_kwargs", "{}"),
    ("continue_final_message", None),
    ("logprobs", 21),
    ("logprobs", True),
    ("xtc_threshold", 0.6),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", float("inf")),
    ("thinking_budget", -1),
    ("thinking_budget", "all"),
    ("seed", -1),
    ("seed", 0.5),
    ("enable_thinking", "no"),
    ("enable_thinking", 0),
    ("preserve_thinking", 1),
    ("tools", {"type": "function", "function": {"name": "f"}}),
    ("tools", [print]),
    ("tools", [{"type": "function", "function": {"parameters": {}}}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}, {}]),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 1),
    ("sampler", 0.7),
    ("logits_processors", print),
    ("logits_processors", [1]),
    ("images", "a.png"),
    ("images", b"\x89PNG"),
    ("videos", "a.mp4"),
    ("max_pixels", 0),
    ("max_pixels", "large"),
    ("min_pixels", True),
    ("total_pixels", 1.5),
    ("fps", 0),
    ("fps", float("nan")),
    ("min_frames", -1),
    ("max_frames", 2.5),
    ("source_fps", -2),
    ("prompt_cache", []),
    ("prefill_step_size", 0),
    ("prefill_step_size", None),
    ("kv_bits", 3),
    ("kv_bits", "4"),
    ("mtp", 8),
    ("stop_in_reasoning", 1),
    ("mtp", "always"),
    ("draft_model", 5),
    ("prompt_lookup", "yes"),
    ("num_draft_tokens", 8),
    ("draft_vocabulary", -1),
    ("draft_vocabulary", "all"),
    ("prefix_cache", 1),
    ("prefix_cache_bytes", -1),
    ("prefix_cache_dir", 5),
    ("prefix_cache_dir_bytes", 0),
    ("max_kv_size", "all"),
    ("progress", "yes"),
    ("progress", None),
]


@pytest.mark.parametrize(("name", "value"), UNUSABLE, ids=lambda value: str(value)[:30])
def test_an_impossible_value_is_refused_with_its_name(loaded: Loaded, name: str, value: object) -> None:
    with pytest.raises(PromptError, match=f"^{name} is .*expected "):
        stream_generate(loaded.model, loaded.processor, "hi", **{name: value})  # type: ignore[arg-type]


def test_no_option_is_left_out_of_what_is_refused() -> None:
    names = {field.name for cls in (GenerationOptions, EngineSettings) for field in fields(cls)}
    assert {name for name, _ in UNUSABLE} == names | {"prompt_cache"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("temprature", "temperature"), ("temp", "temperature"), ("max_new_tokens", "max_tokens"), ("image", "images")],
)
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(loaded: Loaded, name: str, meant: str) -> None:
    for function in (generate, stream_generate, batch_generate, Conversation):
        prompt = None if function is Conversation else ["hi"]
        with pytest.raises(PromptError, match=f"no option '{name}'; did you mean {meant}\\?"):
            function(loaded.model, loaded.processor, prompt, **{name: 0})  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("function", [generate, stream_generate, batch_generate, Conversation])
def test_swapped_or_foreign_arguments_are_refused_by_name(loaded: Loaded, function: Callable[..., object]) -> None:
    with pytest.raises(PromptError, match=r"^model is an object of type Processor; expected .*load\(\.\.\.\)"):
        function(loaded.processor, loaded.model, ["hi"])
    with pytest.raises(PromptError, match=r"^processor is an object of type Model; expected "):
        function(loaded.model, loaded.model, ["hi"])
    with pytest.raises(PromptError, match=r"^model is 'Qwen/Qwen3.5-0.8B'; expected "):
        function("Qwen/Qwen3.5-0.8B", loaded.processor, ["hi"])


def test_a_cache_of_another_model_is_refused(loaded: Loaded, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("moe")
    other = load_model(folder, ModelConfig.from_directory(folder))
    with pytest.raises(PromptError, match="prompt_cache is of another model"):
        stream_generate(loaded.model, loaded.processor, "hi", prompt_cache=other.make_cache())


@pytest.mark.parametrize(
    ("name", "value"),
    [("dtype", "float16"), ("dtype", mx.int32), ("lazy", None), ("revision", 3), ("path_or_repo", ["a"])],
)
def test_load_refuses_arguments_of_another_type(loaded: Loaded, name: str, value: object) -> None:
    arguments: dict[str, object] = {"path_or_repo": loaded.folder, name: value}
    with pytest.raises(PromptError, match=f"^{name} is .*expected "):
        load(**arguments)  # type: ignore[arg-type]


def test_a_sampler_beside_the_options_it_replaces_is_refused() -> None:
    with pytest.raises(PromptError, match=r"sampler replaces.*drop it or top_p"):
        GenerationOptions(sampler=lambda logprobs: logprobs.argmax(-1), top_p=0.5)


def test_kv_bits_beside_a_cache_is_refused(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match=r"model\.make_cache\(kv_bits"):
        stream_generate(loaded.model, loaded.processor, "hi", kv_bits=8, prompt_cache=loaded.model.make_cache())


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


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}, SamplingParameters(0.6, 0.95, 20)),
        ({"temperature": 0.5}, SamplingParameters(0.5)),
        ({"do_sample": True, "temperature": 0}, GREEDY),
        ({"temperature": 0.0, "presence_penalty": 1.5}, GREEDY),
        (
            {"do_sample": True, "repetition_penalty": 1.05, "top_k": None},
            SamplingParameters(1.0, repetition_penalty=1.05),
        ),
        ({"do_sample": True, "eos_token_id": [1]}, THINKING),
        ({}, THINKING),
    ],
)
def test_what_the_checkpoint_states_comes_before_the_recommendation(
    loaded: Loaded, stated: dict[str, object], expected: SamplingParameters
) -> None:
    processor = make_processor(generation_config=stated)
    assert sampling_parameters(loaded.model, processor, GenerationOptions(), thinking=True) == expected
    warmer = GenerationOptions(temperature=0.9)
    assert sampling_parameters(loaded.model, processor, warmer, thinking=True).temperature == 0.9


@pytest.mark.parametrize(
    "stated", [{"temperature": "hot"}, {"top_p": 2}, {"top_k": True}, {"min_p": float("nan")}, {"top_p": [0.5]}]
)
def test_a_checkpoint_that_states_no_numbers_is_named_by_its_file(loaded: Loaded, stated: dict[str, object]) -> None:
    processor = make_processor(generation_config={"do_sample": True, **stated})
    with pytest.raises(CheckpointError, match=f"generation_config.json says {next(iter(stated))} is"):
        sampling_parameters(loaded.model, processor, GenerationOptions(), thinking=True)


@pytest.mark.parametrize(
    ("size", "choices", "row"),
    [
        ("0.8B,2B", {"thinking": False}, "non_thinking_text"),
        ("0.8B,2B", {"thinking": True}, "thinking_text"),
        ("0.8B,2B", {"thinking": False, "pictures": True}, "non_thinking_vl"),
        ("0.8B,2B", {"thinking": True, "pictures": True}, "thinking_vl_or_coding"),
        ("4B,9B", {"thinking": True, "pictures": True}, "thinking_general"),
        ("4B,9B", {"thinking": False, "pictures": True}, "non_thinking_general"),
    ],
)
def test_every_row_of_the_model_cards_has_its_values(size: str, choices: dict[str, bool], row: str) -> None:
    rows = {
        "non_thinking_text": (1.0, 1.0, 20, 2.0),
        "thinking_text": (1.0, 0.95, 20, 1.5),
        "non_thinking_vl": (0.7, 0.8, 20, 1.5),
        "thinking_vl_or_coding": (0.6, 0.95, 20, 0.0),
        "thinking_general": (1.0, 0.95, 20, 1.5),
        "non_thinking_general": (0.7, 0.8, 20, 1.5),
    }
    changes = {"hidden_size": 1024, "num_hidden_layers": 24} if "0.8B" in size else {"hidden_size": 2560}
    text = ModelConfig.from_dict(text_config(**changes)).text
    found = recommended_sampling(text, **choices)
    assert (found.temperature, found.top_p, found.top_k, found.presence_penalty) == rows[row]


def test_versions_that_share_an_architecture_are_told_apart_by_their_template() -> None:
    large = ModelConfig.from_dict(text_config(hidden_size=5120, num_hidden_layers=64)).text
    later = recommended_sampling(large, thinking=True, template="{% if preserve_thinking %}")
    assert (later.presence_penalty, later.temperature) == (0, 1.0)
    assert recommended_sampling(large, thinking=False, is_next=True) == SamplingParameters(0.7, 0.8, 20)
    assert recommended_sampling(large, thinking=True, is_next=True) == SamplingParameters(0.6, 0.95, 20)
    coder = recommended_sampling(large, thinking=False, is_next=True, template="<function=")
    assert coder == SamplingParameters(1.0, 0.95, 40)
