"""YaRN gives transformers' logits wherever a config states it, and other scalings are refused, never left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.errors import ConfigError
from mlx_qwen.loading import load_model
from mlx_qwen.model.rope import rotary
from mlx_qwen.rope_config import RopeConfig, Yarn
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import Kind, reference_logits

IDS = np.random.default_rng(3).integers(0, 300, (1, 96)).tolist()
PLAIN = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
AXES = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
YARN = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
KINDS: list[Kind] = ["dense", "moe_vl", "next"]


def with_rope(source: Path, target: Path, **fields: object) -> Path:
    """A copy whose text config has these fields, and no other on rotary embeddings."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    text = config.get("text_config", config)
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"):
        text.pop(name, None)
    text.update(fields)
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits(path: Path) -> Any:
    model = load_model(path, ModelConfig.from_directory(path))
    return np.array(model(mx.array(IDS)))


def assert_as_transformers(path: Path, source: Path) -> None:
    expected, unscaled = (reference_logits(folder, torch.tensor(IDS)).numpy() for folder in (path, source))
    assert np.abs(logits(path) - expected).max() <= 2e-4 * np.abs(expected).max()
    assert np.abs(expected - unscaled).max() > 1e-2 * np.abs(expected).max(), "the scaling would not be missed"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_factor": 1.7},
        {"beta_fast": 8.0, "beta_slow": 2.0, "factor": 8.0},
        {"mscale": 0.7, "mscale_all_dim": 1.3},
        {"truncate": False, "beta_fast": 6.0},
    ],
)
def test_yarn_gives_the_logits_of_transformers(
    changes: dict[str, object], kind: Kind, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind)
    axes = {} if kind == "next" else AXES
    path = with_rope(source, tmp_path / "in", rope_parameters={**YARN, **axes, **changes})
    assert_as_transformers(path, source)
    convert(path, tmp_path / "out", quantize=False)
    assert np.abs(logits(tmp_path / "out") - logits(path)).max() <= 1e-5


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_rope_scaling_counts_before_rope_parameters(key: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    stated = {key if name == "rope_type" else name: value for name, value in YARN.items()}
    path = with_rope(source, tmp_path / "in", rope_parameters=PLAIN, rope_scaling=stated)
    assert_as_transformers(path, source)


def test_what_rope_scaling_does_not_say_rope_parameters_do(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense_vl")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    path = with_rope(source, tmp_path / "in", rope_parameters={**PLAIN, **AXES}, rope_scaling=scaling)
    whole = with_rope(source, tmp_path / "whole", rope_parameters={**YARN, **AXES})
    assert ModelConfig.from_directory(path).text.rope == ModelConfig.from_directory(whole).text.rope


@pytest.mark.parametrize("values", [PLAIN, YARN])
def test_settings_by_type_of_layer_are_those_of_full_attention(
    values: dict[str, object], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense")
    nested = {"full_attention": {**values, "rope_theta": 5e4}, "linear_attention": {"rope_theta": 1.0}}
    found = ModelConfig.from_directory(with_rope(source, tmp_path / "nested", rope_parameters=nested)).text.rope
    flat = with_rope(source, tmp_path / "flat", rope_parameters=nested["full_attention"])
    assert found == ModelConfig.from_directory(flat).text.rope
    assert found.theta == 5e4


def test_the_positions_reach_as_far_as_they_are_stretched(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    stated = {**YARN, "original_max_position_embeddings": 2048}
    path = with_rope(checkpoint("dense"), tmp_path / "in", rope_parameters=stated)
    assert ModelConfig.from_directory(path).text.max_position_embeddings == 8192


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("theta", [1e4, 1e7])
def test_the_released_sizes_frequencies_are_those_of_transformers_to_the_last_bits(theta: float, factor: float) -> None:
    config = transformers.Qwen3_5TextConfig(
        head_dim=256,
        max_position_embeddings=262144,
        rope_parameters={**YARN, "rope_theta": theta, "factor": factor, "original_max_position_embeddings": 262144},
    )
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    attention = 0.1 * np.log(factor) + 1 if factor > 1 else 1.0
    found = rotary(256, RopeConfig(theta, 0.25, None, Yarn(factor, 262144, 32, 1, attention, True))).frequencies
    np.testing.assert_allclose(np.array(found), expected.numpy(), rtol=3e-7)
    assert scale == pytest.approx(attention)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rope_parameters": {**PLAIN, "rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_parameters": PLAIN, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {**PLAIN, "factor": 2.0}}, "factor is 2.0, which the rotary embedding 'default'"),
        ({"rope_parameters": {**YARN, "short_factor": [1.0]}}, "short_factor is"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "a factor of at least 1"),
        ({"rope_parameters": {**YARN, "factor": "4"}}, "factor is '4', expected a number"),
        ({"rope_parameters": {**PLAIN, "mrope_interleaved": False}}, "mrope_interleaved is false"),
        ({"rope_parameters": {"sliding_attention": PLAIN}}, "expected the settings of full_attention"),
        ({"rope_scaling": ["yarn"]}, "rope_scaling is"),
    ],
)
def test_what_is_not_known_is_refused(
    fields: dict[str, object], complaint: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = with_rope(checkpoint("dense"), tmp_path / "in", **fields)
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig.from_directory(path)


def test_numbers_that_are_null_count_as_left_out(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    stated = {**PLAIN, "factor": None, "attention_factor": None}
    path = with_rope(checkpoint("dense"), tmp_path / "in", rope_parameters=stated, rope_scaling=None)
    assert ModelConfig.from_directory(path).text.rope.yarn is None
