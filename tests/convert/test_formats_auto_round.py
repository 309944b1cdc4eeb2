"""AutoRound checkpoints convert to what they stand for, in each of its packings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.convert import convert
from mlx_qwen.errors import CheckpointError
from tests.conftest import CheckpointFactory
from tests.support.foreign import (
    Encoder,
    Values,
    assert_reference_logits,
    edit_tensors,
    every_projection,
    foreign_checkpoint,
    logits,
)
from tests.support.integer_codes import little_endian, nearest
from tests.support.mlx_folders import dequantized, equal, expected_arrays, main_arrays

AS_GPTQ = {"auto_round": 0, "auto_round:gptqmodel": 0, "auto_round:auto_gptq": 1}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def settings(packing: str | None, bits: int = 4, *, symmetric: bool = True, group_size: int = 32) -> dict[str, object]:
    common = {"quant_method": "auto-round", "bits": bits, "group_size": group_size, "sym": symmetric}
    common["data_type"] = "int"
    return common if packing is None else {**common, "packing_format": packing}


def as_gptq(zero_offset: int, *, bits: int = 4, symmetric: bool = True, group_size: int = 32) -> Encoder:
    """Words along the inputs, as GPTQ has them, without `g_idx`."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        K = weight.shape[1]
        found = nearest(weight, np.arange(K) // min(group_size, K), bits=bits, symmetric=symmetric)
        return {
            "qweight": torch.from_numpy(little_endian(found.codes, bits).T.copy()),
            "qzeros": torch.from_numpy(little_endian(found.zeros.T - zero_offset, bits)),
            "scales": found.scales.T,
        }, found.values

    return encode


def as_awq(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """Words along the outputs, each of eight in AWQ's order."""
    found = nearest(weight, np.arange(weight.shape[1]) // 32, bits=4, symmetric=True)
    words = [
        torch.from_numpy(little_endian(codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER].reshape(codes.shape), 4))
        for codes in (found.codes.T, found.zeros.T)
    ]
    return {"qweight": words[0], "qzeros": words[1], "scales": found.scales.T}, found.values


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packing", AS_GPTQ)
def test_dequantizing_gives_the_exact_values(
    packing: str, bits: int, symmetric: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    encoder = as_gptq(AS_GPTQ[packing], bits=bits, symmetric=symmetric)
    stated = settings(packing, bits, symmetric=symmetric)
    foreign, plain = foreign_checkpoint(checkpoint("dense", layers=1), tmp_path, stated, encoder)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize(
    ("packing", "group_size", "encoder"),
    [(None, 32, as_gptq(1)), ("auto_round", -1, as_gptq(0, group_size=1 << 30)), ("auto_round:auto_awq", 32, as_awq)],
)
def test_codes_are_kept_and_give_the_logits_of_the_reference(
    packing: str | None, group_size: int, encoder: Encoder, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    stated = settings(packing, group_size=group_size)
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, stated, encoder)
    report = convert(foreign, tmp_path / "out")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert len(report.kept_codes) == 37
    for kept in report.kept_codes:
        assert equal(dequantized(written, kept, 4), expected[kept]), kept
    convert(foreign, tmp_path / "exact", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "exact", plain)


def test_what_differs_for_single_modules_is_heeded(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    def encoder(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        bits = 8 if weight.shape == (128, 64) else 4
        return as_gptq(1, bits=bits, symmetric=bits == 4)(weight)

    apart = {"bits": 8, "sym": False}
    stated = {**settings(None), "extra_config": {r".*mlp\.(gate|up)_proj": apart, "model.layers.3.mlp.up_proj": apart}}
    foreign, plain = foreign_checkpoint(
        checkpoint("dense"), tmp_path, stated, encoder, chosen=lambda name: ".mlp." in name
    )
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


def test_other_packings_are_refused_by_name(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, settings("auto_round:llm_compressor"), as_gptq(0))
    with pytest.raises(CheckpointError, match=r"packing_format is 'auto_round:llm_compressor', expected one of"):
        convert(foreign, tmp_path / "out")


def for_mlx(bits: int) -> Encoder:
    """Codes and grids as AutoRound's export for MLX writes them, in fp16: scale · code + bias."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        found = nearest(weight, np.arange(weight.shape[1]) // 32, bits=bits, symmetric=True)
        words = torch.from_numpy(little_endian(found.codes, bits)).view(torch.uint32)
        biases = (-found.scales.float() * torch.from_numpy(found.zeros)).half()
        groups = np.arange(weight.shape[1]) // 32
        values = found.codes * found.scales.float().numpy()[:, groups] + biases.float().numpy()[:, groups]
        return {"weight": words, "scales": found.scales, "biases": biases}, values.astype(np.float32)

    return encode


def flattened(folder: Path, quantization: dict[str, object]) -> None:
    """What the export makes of config.json: rotary settings beside all others."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4, "lm_head": False}
    config["quantization_config"] = quantization
    config |= config.pop("rope_parameters")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("said", ["mlx", None])
def test_the_export_for_mlx_keeps_its_codes_and_gives_the_logits_of_the_reference(
    said: str | None, kind: str, bits: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    stated = {"group_size": 32, "bits": bits} if said is None else settings(said, bits)
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, {}, for_mlx(bits))
    flattened(foreign, stated)
    convert(foreign, tmp_path / "out", dtype="float16", bits=bits, group_size=32)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    kept = [name for name in expected if every_projection(name) or "switch_mlp" in name]
    assert len([name for name in kept if "switch_mlp" in name]) == (12 if kind == "moe" else 0)
    for name in kept:
        assert equal(dequantized(written, name, bits), expected[name]), name
    convert(foreign, tmp_path / "exact", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "exact", plain)


def test_experts_packed_apart_that_are_incomplete_or_loaded_are_one_clear_error(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, {}, for_mlx(4))
    flattened(foreign, {"group_size": 32, "bits": 4})
    with pytest.raises(CheckpointError, match=r"packed apart from the other experts.*mlx-qwen convert --hf-path"):
        logits(foreign)
    edit_tensors(
        foreign, lambda tensors: tensors.pop(next(n for n in tensors if n.endswith("experts.3.up_proj.weight")))
    )
    with pytest.raises(CheckpointError, match="not packed alike, or some of them are missing"):
        convert(foreign, tmp_path / "out")
