"""ModelOpt's and Quark's checkpoints, and FP8 with scales of every kind, convert to what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from torch import Tensor

from mlx_qwen.checkpoint.foreign import CONVERTED
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert, formats
from mlx_qwen.errors import CheckpointError, ConfigError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.foreign import Encoder, Values, assert_reference_logits, edit_tensors, foreign_checkpoint
from tests.support.mlx_folders import equal, expected_arrays, main_arrays

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Stored = tuple[dict[str, Tensor], Values]
PROJECTION = "model.layers.0.mlp.up_proj"


def e2m1(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest e2m1 numbers [N, K]: as codes, two a byte with the first in the lower half, and as values."""
    nearest = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = (nearest + 8 * (values < 0)).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), E2M1[nearest] * torch.where(values < 0, -1.0, 1.0)


def nvfp4(weight: Tensor) -> Stored:
    """ModelOpt: e2m1 × e4m3 scale of 16 × fp32 scale of all."""
    groups = weight.reshape(len(weight), -1, 16)
    whole = (weight.abs().max() / (6 * 448)).reshape(())
    scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    spread = (scale.float() * whole).repeat_interleave(16, 1)
    packed, numbers = e2m1(weight / spread.clamp(min=1e-12))
    parts = {"weight": packed, "weight_scale": scale, "weight_scale_2": whole, "input_scale": torch.tensor(0.5)}
    return parts, (numbers * spread).numpy()


def mxfp4(weight: Tensor) -> Stored:
    """Quark: e2m1 × 2^(e − 127) of 32."""
    groups = weight.reshape(len(weight), -1, 32)
    exponents = (groups.abs().amax(-1).clamp(min=1e-30).log2().floor() - 2 + 127).to(torch.uint8)
    spread = torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    packed, numbers = e2m1(weight / spread)
    return {"weight": packed, "weight_scale": exponents}, (numbers * spread).numpy()


def fp8(shape: str) -> Encoder:
    """e4m3 × a scale for all, or one a row, in the shapes that are published."""

    def encode(weight: Tensor) -> Stored:
        by_row = shape.startswith("row")
        most = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max().reshape(1, 1)
        scale = (most / 448).float()
        codes = (weight / scale).to(torch.float8_e4m3fn)
        shapes = {"row": (-1,), "row, column": (-1, 1), "one": (), "one, axis": (1,)}
        parts = {"weight": codes, "weight_scale": scale.reshape(shapes[shape]), "input_scale": torch.tensor(0.1)}
        return parts, (codes.float() * scale).numpy()

    return encode


def mixed(weight: Tensor) -> Stored:
    return nvfp4(weight) if len(weight) > 64 else fp8("one")(weight)


MODELOPT: dict[str, object] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}
KINDS: dict[str, tuple[dict[str, object], Encoder]] = {
    "modelopt NVFP4": (MODELOPT, nvfp4),
    "modelopt FP8": ({**MODELOPT, "quant_algo": "FP8"}, fp8("one")),
    "modelopt FP8 by row": ({**MODELOPT, "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, fp8("row")),
    "modelopt mixed": ({**MODELOPT, "quant_algo": "MIXED_PRECISION"}, mixed),
    "quark MXFP4": ({"quant_method": "quark"}, mxfp4),
    "quark FP8": ({"quant_method": "quark"}, fp8("one, axis")),
    "fp8 one": ({"quant_method": "fp8"}, fp8("one")),
    "fp8 by row": ({"quant_method": "fp8"}, fp8("row")),
    "fp8 by row in a column": ({"quant_method": "fp8", "weight_block_size": None}, fp8("row, column")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_it_is_what_its_format_says(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    settings, encode = KINDS[kind]
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, settings, encode)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in written if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize("kind", ["modelopt NVFP4", "quark MXFP4"])
def test_experts_are_read_too_and_give_the_references_logits(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    settings, encode = KINDS[kind]
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, settings, encode)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.fixture
def modelopt(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    return foreign_checkpoint(checkpoint("dense"), tmp_path, MODELOPT, nvfp4)[0]


def test_settings_in_a_file_of_their_own_count_as_those_in_the_config(modelopt: Path, tmp_path: Path) -> None:
    beside = shutil.copytree(modelopt, tmp_path / "beside")
    config = json.loads((beside / "config.json").read_text())
    del config["quantization_config"]
    (beside / "config.json").write_text(json.dumps(config))
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (beside / "hf_quant_config.json").write_text(json.dumps(stated))
    for name, folder in (("a", modelopt), ("b", beside)):
        convert(folder, tmp_path / name, dequantize=True, dtype="float32")
    first, second = main_arrays(tmp_path / "a"), main_arrays(tmp_path / "b")
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "b" / "hf_quant_config.json").exists()
    load_model(tmp_path / "b", ModelConfig.from_directory(tmp_path / "b"))


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "scaled inputs": (
        lambda tensors: tensors.update({f"{PROJECTION}.pre_quant_scale": torch.ones(64)}),
        "scales its inputs",
    ),
    "no scale of all": (lambda tensors: tensors.pop(f"{PROJECTION}.weight_scale_2"), "stored without .*weight_scale_2"),
    "scales of another shape": (
        lambda tensors: tensors.update({f"{PROJECTION}.weight_scale": tensors[f"{PROJECTION}.weight_scale"][:, :2]}),
        "expected",
    ),
    "scales of another dtype": (
        lambda tensors: tensors.update(
            {f"{PROJECTION}.weight_scale": tensors[f"{PROJECTION}.weight_scale"].to(torch.float32)}
        ),
        "as NVFP4 has or U8 as MXFP4 has",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_decoded_is_one_clear_error(fault: str, modelopt: Path, tmp_path: Path) -> None:
    damage, said = FAULTS[fault]

    def change(tensors: dict[str, Tensor]) -> None:
        damage(tensors)
        for name, tensor in tensors.items():
            tensors[name] = tensor.contiguous()

    edit_tensors(modelopt, change)
    with pytest.raises(CheckpointError, match=said):
        convert(modelopt, tmp_path / "out")


@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "hqq"])
def test_what_is_read_nowhere_says_what_to_use_instead(
    method: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    said = f"quantized with '{method}', which is not read here.*use the unquantized checkpoint"
    with pytest.raises(CheckpointError, match=said):
        convert(folder, tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        load_model(folder, ModelConfig.from_directory(folder))


def test_a_folder_of_gguf_files_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"GGUF files are llama\.cpp's: use the repository"):
        ModelConfig.from_directory(tmp_path)


def test_loading_names_the_converter_for_just_what_it_reads() -> None:
    assert tuple(formats._FORMATS) == CONVERTED
