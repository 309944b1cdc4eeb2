"""Folders whose weights are quantized for another runtime are planned for from their files."""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.checkpoint.layout import plan_checkpoint
from mlx_qwen.checkpoint.names import Role, TensorSpec, tensor_specs
from mlx_qwen.checkpoint.released import released
from mlx_qwen.checkpoint.shards import TensorInfo, checkpoint_tensors, companion_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.formats import decodable
from mlx_qwen.convert.options import DescriptionOptions, check_settings
from mlx_qwen.convert.outputs import plan_outputs
from mlx_qwen.convert.planning import plan
from mlx_qwen.convert.planning.described import describe
from mlx_qwen.convert.planning.weight_sizes import UNPACKED, weights_of
from mlx_qwen.convert.work.write import source_bytes
from tests.conftest import CheckpointFactory
from tests.support.foreign import Values, foreign_checkpoint
from tests.support.integer_codes import little_endian, nearest

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}


def in_one_block(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    scale = (weight.abs().max() / 400).to(torch.bfloat16)
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    blocks = (-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    return {"weight": codes, "weight_scale_inv": scale.expand(blocks)}, (codes.float() * scale.float()).numpy()


def in_four_bits(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    found = nearest(weight, np.arange(weight.shape[1]) // 32, bits=4, symmetric=True)
    return {
        "qweight": torch.from_numpy(little_endian(found.codes, 4).T.copy()),
        "qzeros": torch.from_numpy(little_endian(found.zeros.T - 1, 4)),
        "scales": found.scales.T,
    }, found.values


@pytest.fixture(params=["fp8", "gptq"])
def folder(request: pytest.FixtureRequest, checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    settings, encode = (FP8, in_one_block) if request.param == "fp8" else (GPTQ, in_four_bits)
    source = checkpoint("moe", layers=2, interval=2, dtype="bfloat16")
    return foreign_checkpoint(source, tmp_path / "made", settings, encode)[0]


@pytest.mark.filterwarnings("ignore:.*packed again")
@pytest.mark.parametrize("recipe", ["mixed-4-8", "4bit", UNPACKED])
def test_a_folder_is_counted_to_the_byte_that_its_conversion_writes(folder: Path, recipe: str, tmp_path: Path) -> None:
    asked = None if recipe == UNPACKED else recipe
    convert(folder, tmp_path / "out", recipe=asked, quantize=recipe != UNPACKED)
    stored = [*checkpoint_tensors(tmp_path / "out").values(), *companion_tensors(tmp_path / "out").values()]
    assert weights_of(describe(folder), recipe).total == sum(info.nbytes for info in stored)


def test_the_size_before_conversion_is_that_of_the_files(folder: Path) -> None:
    stored = sum(info.nbytes for info in checkpoint_tensors(folder).values())
    assert weights_of(describe(folder)).source == pytest.approx(stored, rel=1e-3)
    assert "sizes from its files" in plan(folder, context=16, memory="8GB").table()


class Header(TensorInfo):
    """A tensor of which only the header is there; its values are taken to need every bit of their dtype."""

    __slots__ = ()

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        return mx.array([1 / 3], mx.bfloat16 if self.dtype == "BF16" else mx.float32)


def header(name: str, dtype: str, *shape: int) -> Header:
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    return Header(name, Path("model.safetensors"), dtype, shape, 0, sizes[dtype] * prod(shape))


def published_fp8(spec: TensorSpec) -> Iterator[Header]:
    """The tensors that the official FP8 checkpoints store for one of ours."""
    name = spec.name.replace("language_model.lm_head", "lm_head").replace("vision_tower.", "model.visual.")
    name = name.replace("language_model.model.", "model.language_model.")
    if spec.role is Role.EXPERT:
        mlp, _, projection = name.partition(".switch_mlp.")
        for i in range(spec.shape[0]):
            yield from in_blocks(f"{mlp}.experts.{i}.{projection}", *spec.shape[1:])
    elif spec.role is Role.LINEAR and name != "mtp.fc.weight":
        yield from in_blocks(name, *spec.shape)
    elif spec.role is Role.CONV:
        yield header(name, "BF16", spec.shape[0], 1, spec.shape[1])
    elif len(spec.shape) == 5:
        yield header(name, "BF16", spec.shape[0], spec.shape[4], *spec.shape[1:4])
    else:
        exact = name.endswith((".A_log", ".linear_attn.norm.weight"))
        yield header(name, "F32" if exact else "BF16", *spec.shape)


def in_blocks(name: str, rows: int, columns: int) -> Iterator[Header]:
    yield header(name, "F8_E4M3", rows, columns)
    yield header(f"{name}_scale_inv", "BF16", -(-rows // 128), -(-columns // 128))


def test_the_official_fp8_checkpoint_is_counted_as_published_and_plans_as_the_unquantized_one() -> None:
    config = ModelConfig.from_dict({**released("35B-A3B").raw, "quantization_config": FP8})
    tensors = {info.name: info for spec in tensor_specs(config) for info in published_fp8(spec)}
    assert (len(tensors), sum(info.nbytes for info in tensors.values())) == (64_196, 37_454_799_072)
    settings = check_settings(DescriptionOptions(recipe="mixed-4-8"))
    checkpoint = plan_checkpoint(config, decodable(config, tensors, settings.keeps))
    assert source_bytes(checkpoint) == 37_454_799_072
    assert plan_outputs(checkpoint, settings).nbytes == weights_of(describe("35B-A3B"), "mixed-4-8").total
