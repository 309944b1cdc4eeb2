"""What a config or a caller states is honoured or refused, never guessed."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.errors import ConfigError
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import Model
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_model

IDS = mx.array([[5, 117, 42, 42, 260, 9, 31, 208]])
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def loaded(path: Path, dtype: mx.Dtype | None = None) -> Model:
    return load_model(path, ModelConfig.from_directory(path), dtype=dtype)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4", "affine"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_dtype_asked_for_is_that_of_activations_and_logits_whatever_packs_the_embeddings(
    mode: str, kind: str, tied: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint(kind, tied=tied, dtype="bfloat16"), tmp_path / "out", mode=mode)  # type: ignore[arg-type]
    for dtype in DTYPES:
        model = loaded(tmp_path / "out", dtype)
        assert model.dtype == model.embed_tokens(IDS).dtype == model(IDS).dtype == dtype
    convert(tmp_path / "out", tmp_path / "plain", dequantize=True, dtype="float32")
    expected = np.array(loaded(tmp_path / "plain")(IDS))
    actual = np.array(loaded(tmp_path / "out", mx.float32)(IDS))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_by_default_activations_have_the_dtype_of_what_is_unpacked(
    dtype: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("dense"), tmp_path / "out", mode="mxfp8", dtype=dtype)  # type: ignore[arg-type]
    assert loaded(tmp_path / "out").dtype == getattr(mx, dtype)


def with_vision(source: Path, target: Path, **fields: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config["vision_config"].update(fields)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {"rope_type": "axial", "rope_theta": 200.0}},
        {"rope_parameters": {"rope_theta": 3.0, "rope_type": "axial"}},
        {"hidden_act": "gelu_new"},
    ],
)
def test_the_vision_towers_settings_give_the_features_of_transformers(
    fields: dict[str, object], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense_vl")
    path = with_vision(source, tmp_path / "in", **fields)
    pixels = np.random.default_rng(0).standard_normal((24, 96)).astype(np.float32)
    tower = reference_model(path).model.visual
    with torch.no_grad():
        expected = tower(torch.from_numpy(pixels), torch.tensor([[1, 4, 6]])).pooler_output.numpy()
    ours = loaded(path).vision
    assert ours is not None
    actual = np.array(ours(mx.array(pixels), [Grid(1, 4, 6)]))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
    convert(path, tmp_path / "out", quantize=False)
    written = loaded(tmp_path / "out").vision
    assert written is not None
    assert np.abs(np.array(written(mx.array(pixels), [Grid(1, 4, 6)])) - actual).max() <= 1e-5


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'gelu_pytorch_tanh'"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}}, "factor 2.0"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta is -1"),
        ({"num_heads": 5}, "expected a multiple of num_heads"),
        ({"num_heads": 0}, "num_heads is 0"),
    ],
)
def test_settings_of_the_vision_tower_that_are_not_known_are_refused(
    fields: dict[str, object], complaint: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ModelConfig.from_directory(with_vision(checkpoint("dense_vl"), tmp_path / "in", **fields))
