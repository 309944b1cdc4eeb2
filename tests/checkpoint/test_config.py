"""Configurations of every released size are understood; impossible ones are refused in one sentence."""

import json
from pathlib import Path

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import ConfigError
from tests.support.configs import text_config


def refused(**changes: object) -> str:
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(text_config(**changes))
    return str(caught.value)


def test_layer_types_win_over_the_interval() -> None:
    types = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    assert ModelConfig.from_dict(text_config(layer_types=types)).text.layer_types == tuple(types)


def test_without_layer_types_every_nth_layer_is_full_attention() -> None:
    text = ModelConfig.from_dict(text_config(full_attention_interval=2)).text
    assert [kind == "full_attention" for kind in text.layer_types] == [False, True, False, True]


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}},
        {"rope_theta": 5e6, "partial_rotary_factor": 0.5},
        {"rope_theta": 5e6, "partial_rotary_factor": 0.5, "rope_scaling": None},
    ],
)
def test_rotary_settings_are_read_in_old_and_new_places(fields: dict[str, object]) -> None:
    rope = ModelConfig.from_dict(text_config(**fields)).text.rope
    assert (rope.theta, rope.partial_rotary_factor) == (5e6, 0.5)


def test_a_nested_text_config_is_read_as_a_flat_one() -> None:
    flat = ModelConfig.from_dict(text_config(tie_word_embeddings=True, eos_token_id=[3, 4]))
    nested = ModelConfig.from_dict(
        {"model_type": "qwen3_5", "text_config": text_config(eos_token_id=[3, 4]), "tie_word_embeddings": True}
    )
    assert nested.text == flat.text
    assert nested.eos_token_ids == (3, 4)


def test_end_tokens_are_the_union_of_both_places() -> None:
    raw = {"model_type": "qwen3_5", "text_config": text_config(eos_token_id=7), "eos_token_id": [8, 7]}
    assert ModelConfig.from_dict(raw).eos_token_ids == (7, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["llama", "qwen3_5_moe", "mlx-lm"]),
        ({"hidden_size": -1}, ["hidden_size", "-1", "at least 1"]),
        ({"hidden_size": "64"}, ["hidden_size", "'64'"]),
        ({"linear_num_value_heads": 3}, ["linear_num_value_heads", "multiple"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "multiple"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "expected 4"]),
        ({"layer_types": ["sliding_attention"] * 4}, ["layer_types", "sliding_attention"]),
        ({"attn_output_gate": False}, ["attn_output_gate"]),
        ({"rope_parameters": {"rope_type": "yarn"}}, ["rope_type", "yarn"]),
        ({"partial_rotary_factor": 1.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"mrope_section": [1, 2]}}, ["mrope_section"]),
        ({"mtp_num_hidden_layers": 2}, ["mtp_num_hidden_layers"]),
        ({"text_config": None}, ["text_config", "None", "an object"]),
        ({"vision_config": [1]}, ["vision_config", "an object"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "an object"]),
        ({"rope_parameters": {"mrope_section": [1, "a", 2]}}, ["mrope_section", "whole number"]),
        ({"layer_types": 3}, ["layer_types", "list of texts"]),
        ({"layer_types": [[]]}, ["layer_types", "list of texts"]),
        ({"mlp_only_layers": "x"}, ["mlp_only_layers"]),
        ({"eos_token_id": "x"}, ["eos_token_id"]),
        ({"rms_norm_eps": 1e400}, ["rms_norm_eps"]),
        ({"model_type": "qwen3_5_moe_text"}, ["num_experts"]),
    ],
)
def test_impossible_values_are_refused_by_name(changes: dict[str, object], words: list[str]) -> None:
    message = refused(**changes)
    assert all(word in message for word in words), message


def test_more_experts_a_token_than_experts_is_refused() -> None:
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    assert "num_experts_per_tok" in refused(model_type="qwen3_5_moe_text", num_experts_per_tok=5, **experts)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no config.json"), ("{", "cannot be read"), ("[]", "JSON object")]
)
def test_an_unreadable_file_is_one_clear_error(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_directory(tmp_path)


def test_the_file_is_kept_as_read(tmp_path: Path) -> None:
    raw = text_config(something_new=[1, 2])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_directory(tmp_path).raw == raw
