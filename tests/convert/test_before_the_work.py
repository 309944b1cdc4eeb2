"""What would spoil a conversion at its end, or its loading, is found before the first byte is written."""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_qwen import load
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert, describe
from mlx_qwen.convert.work import write
from mlx_qwen.errors import CheckpointError, ConfigError, ConversionError, MLXQwenError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.tokenizers import add_tokenizer

Spoil = Callable[[Path], object]


@pytest.fixture
def source(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A complete model, to be spoilt."""
    return add_tokenizer(shutil.copytree(checkpoint("dense"), tmp_path / "source"))


def write_text(name: str, text: str) -> Spoil:
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (write_text("tokenizer.json", "{}"), "tokenizer.json"),
        (write_text("tokenizer.json", ""), "tokenizer.json"),
        (write_text("chat_template.jinja", "{% if %}"), "template"),
        (write_text("generation_config.json", ""), "generation_config.json cannot be read"),
        (write_text("generation_config.json", "[]"), "generation_config.json holds a list"),
        (write_text("tokenizer_config.json", "{"), "tokenizer_config.json cannot be read"),
    ],
)
def test_what_loading_needs_is_read_before_the_work(spoil: Spoil, complaint: str, source: Path, tmp_path: Path) -> None:
    spoil(source)
    with pytest.raises(MLXQwenError, match=complaint):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_a_complete_source_converts_and_loads(source: Path, tmp_path: Path) -> None:
    assert convert(source, tmp_path / "out").description.remarks == ()
    load(tmp_path / "out")


def test_weights_that_come_alone_are_remarked_on(checkpoint: CheckpointFactory) -> None:
    assert any("no tokenizer.json" in remark for remark in describe(checkpoint("dense")).remarks)


@pytest.mark.parametrize(
    "front",
    [
        "tags: 5", "tags: {a: 1}", "1: 2", "- a\n- b", "just text", "tags: [1, null]", "license: !!python/name:os.sep",
        "base_model: 3", "x: &a [*a]", "language: 2020-01-01", "\t- : :",
    ],
)  # fmt: skip
def test_an_odd_model_card_costs_no_weights(front: str, source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text(f"---\n{front}\n---\n# Model\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(source, tmp_path / "out")
    assert "library_name: mlx" in (tmp_path / "out" / "README.md").read_text()


def test_finished_weights_stay_whatever_fails_beside_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_qwen.convert import job

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(job, "copy_files", broken)
        with pytest.raises(RuntimeError, match="unforeseen"):
            convert(source, tmp_path / "out")
    produced: list[object] = []
    produce = write.produce
    monkeypatch.setattr(write, "produce", lambda *what: produced.append(what) or produce(*what))
    convert(source, tmp_path / "out")
    assert produced == [], "what was finished is not written again"
    load(tmp_path / "out")


def test_a_link_to_a_folder_is_written_through(source: Path, tmp_path: Path) -> None:
    real = tmp_path / "disk" / "model"
    convert(source, real, bits=8)
    (tmp_path / "link").symlink_to(real)
    convert(source, tmp_path / "link", bits=4, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((real / "config.json").read_text())["quantization"]["bits"] == 4
    assert not (tmp_path / "link.partial").exists()


def test_a_link_that_leads_nowhere_yet_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    convert(source, tmp_path / "link")
    assert (tmp_path / "disk" / "model" / "config.json").is_file()


def test_a_link_in_a_circle_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.raises(ConversionError):
        convert(source, tmp_path / "link")


def test_overwriting_is_advised_only_where_it_would_be_done(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match="no model folder, which --overwrite does not replace either"):
            convert(source, tmp_path / "out", overwrite=overwrite)


@pytest.mark.skipif(os.geteuid() == 0, reason="the super-user may read everything")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).chmod(0)
    with pytest.raises(MLXQwenError, match="may not be read"):
        convert(source, tmp_path / "out")


def test_float64_weights_load_and_convert_as_their_fp32_values(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    ids = mx.array([[5, 9, 2]])
    expected = np.array(load_model(source, ModelConfig.from_directory(source))(ids))
    save_file({name: tensor.to(torch.float64) for name, tensor in tensors.items()}, source / "model.safetensors")
    assert np.array_equal(np.array(load_model(source, ModelConfig.from_directory(source))(ids)), expected)
    convert(source, tmp_path / "out", quantize=False, dtype="float32")
    out = tmp_path / "out"
    assert np.array_equal(np.array(load_model(out, ModelConfig.from_directory(out))(ids)), expected)


GROUPS = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": 5},
        {"quantization_config": ["gptq"]},
        {"quantization_config": {"quant_method": ["x"]}},
        {"quantization_config": {"quant_method": "nothing"}},
        {"quantization_config": {**GROUPS, "config_groups": 5}},
        {"quantization_config": {**GROUPS, "config_groups": {"a": 5}}},
        {"quantization_config": {**GROUPS, "config_groups": {"a": {"weights": 5}}}},
        {"quantization_config": {**GROUPS, "format": ["x"]}},
        {"quantization_config": {**GROUPS, "transform_config": 5}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, "x"]}},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
        {"quantization_config": {"quant_method": "gptq", "checkpoint_format": ["x"]}},
        {"quantization_config": {"quant_method": "auto-round", "packing_format": ["x"]}},
        {"mlx_qwen": {"format": 1, "companion": None}},
        {"mlx_qwen": {"format": 1, "companion": [5]}},
        {"num_hidden_layers": 1_000_000},
        {"num_hidden_layers": 10**400},
        {"hidden_size": 10**400},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": float("inf")},
        {"rope_parameters": {"rope_theta": float("nan")}},
        {"rope_parameters": 5},
    ],
    ids=str,
)
def test_nested_settings_of_any_type_are_one_clear_error(
    changes: dict[str, object], source: Path, tmp_path: Path
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        load(source)
    assert len(str(caught.value)) < 1000
    if "mlx_qwen" not in changes:
        with pytest.raises((CheckpointError, ConfigError)):
            convert(source, tmp_path / "out")
