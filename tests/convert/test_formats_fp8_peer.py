"""FP8 checkpoints that transformers itself encodes convert to what transformers itself reads from them."""

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers.quantizers import AutoHfQuantizer

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.foreign import INPUT_IDS, Encoder, Values, assert_reference_logits, foreign_checkpoint, logits
from tests.support.mlx_folders import companion_arrays, equal, expected_arrays, main_arrays

# One tensor an expert as Qwen stores them, and one for all experts as transformers holds them.
SOURCES: dict[str, tuple[str, dict[str, object]]] = {
    "dense": ("dense_vl", {}),
    "experts": ("moe", {}),
    "fused experts": ("moe", {"fused_experts": True}),
    "next": ("next", {}),
}


def fp8(block: tuple[int, int], scale_format: str) -> tuple[dict[str, object], Encoder]:
    """The `quantization_config`, and codes, scales and the values that they stand for, all by transformers."""
    config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_format)
    quantize = AutoHfQuantizer.from_config(config, pre_quantized=False).get_quantize_ops()

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        stored = quantize.convert({"weight": weight})
        values = quantize.reverse_op.convert(dict(stored))["weight"].float().numpy()
        if weight.ndim == 3:
            stored = {"": stored["weight"], "_scale_inv": stored["weight_scale_inv"]}
        return stored, values

    return json.loads(config.to_json_string(use_diff=False)), encode


def logits_of_transformers(folder: Path) -> Values:
    """What transformers makes of the prompt with the folder's own FP8 weights, which it unpacks on a CPU."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(INPUT_IDS), use_cache=False).logits
    return cast(Values, found.numpy())


@pytest.mark.parametrize(("block", "scale_format"), [((32, 32), "float"), ((16, 64), "float"), ((32, 32), "ue8m0")])
@pytest.mark.parametrize("name", SOURCES)
def test_what_transformers_writes_means_here_what_it_means_there(
    name: str, block: tuple[int, int], scale_format: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    kind, options = SOURCES[name]
    source = checkpoint(kind, layers=2, interval=2, with_mtp=True, **options)
    foreign, plain = foreign_checkpoint(source, tmp_path, *fp8(block, scale_format))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written = main_arrays(tmp_path / "out") | companion_arrays(tmp_path / "out")
    expected = expected_arrays(plain)
    assert written.keys() == expected.keys()
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("name", SOURCES)
def test_converted_it_gives_the_logits_of_the_reference_with_its_values(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    kind, options = SOURCES[name]
    source = checkpoint(kind, layers=2, interval=2, **options)
    foreign, plain = foreign_checkpoint(source, tmp_path, *fp8((32, 32), "float"))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
@pytest.mark.parametrize("kind", ["dense_vl", "moe", "next"])
def test_converted_it_gives_the_logits_that_transformers_reads_from_it(
    kind: str, scale_format: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, layers=2, interval=2)
    foreign, _ = foreign_checkpoint(source, tmp_path, *fp8((32, 32), scale_format))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    expected, actual = logits_of_transformers(foreign), logits(tmp_path / "out")
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()
