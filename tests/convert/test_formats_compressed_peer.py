"""What the compressed-tensors package itself writes converts to what it reads back from it."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils.helpers import calculate_qparams
from torch import Tensor

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_model
from tests.support.foreign import (
    INPUT_IDS,
    Encoder,
    Values,
    assert_reference_logits,
    foreign_checkpoint,
    logits,
)
from tests.support.mlx_folders import dequantized, equal, expected_arrays, main_arrays

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")

FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    **{
        f"int{bits}{'' if symmetric else ' asymmetric'}": (
            "pack-quantized",
            {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric},
        )
        for bits, symmetric in ((2, True), (3, True), (3, False), (5, False), (6, True), (7, True))
    },
    "int8": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 unpacked": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
}
IGNORED = ["lm_head", "re:.*visual.*", "re:.*in_proj_[ab]$", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def scheme_of(name: str) -> QuantizationScheme:
    kind, arguments = FORMATS[name]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments), format=kind)


def settings(name: str) -> dict[str, object]:
    """The `quantization_config` of a checkpoint in this format."""
    kind, arguments = FORMATS[name]
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": arguments}},
        "ignore": IGNORED,
    }


def grid(weight: Tensor, scheme: QuantizationScheme) -> dict[str, Tensor]:
    """Scales and zeros of `weight` [N, K] as the package calculates them from the extremes of its groups."""
    weights, found = scheme.weights, {}
    groups = weight.reshape(weight.shape[0], -1, weights.group_size or weight.shape[1])
    if scheme.format.startswith("nvfp4"):
        found["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
    found["weight_scale"], found["weight_zero_point"] = calculate_qparams(
        groups.amin(-1), groups.amax(-1), weights, found.get("weight_global_scale")
    )
    return found


def peer(name: str, *, scale_dtype: torch.dtype = torch.float32) -> Encoder:
    """Codes and, in fp32, the values that they stand for, both by compressed-tensors."""
    scheme = scheme_of(name)
    compressor = BaseCompressor.get_value_from_registry(scheme.format)

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        found = grid(weight, scheme)
        found["weight_scale"] = found["weight_scale"].to(scale_dtype)
        stored = compressor.compress({"weight": weight, **found}, scheme)
        if name == "nvfp4":
            return stored, exact_nvfp4(stored, weight, scheme)
        # It computes in the dtype of the scales.
        wide = stored if name.startswith("mx") else {**stored, "weight_scale": stored["weight_scale"].float()}
        return stored, compressor.decompress(wide, scheme)["weight"].float().numpy()

    return encode


def exact_nvfp4(stored: dict[str, Tensor], weight: Tensor, scheme: QuantizationScheme) -> Values:
    """The package's values in fp32: its decompressor rounds these to bf16."""
    codes = unpack_fp4_from_uint8(stored["weight_packed"], *weight.shape, dtype=torch.float32)
    values = dequantize(
        codes,
        stored["weight_scale"].float(),
        args=scheme.weights,
        dtype=torch.float32,
        global_scale=stored["weight_global_scale"],
    )
    return cast(Values, values.numpy())


def logits_of_transformers(folder: Path) -> Values:
    """What transformers makes of the prompt with the folder's own packed weights, which the package unpacks for it."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    unpacking = transformers.CompressedTensorsConfig(dequantize=True)
    model = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, quantization_config=unpacking
    )
    with torch.no_grad():
        found = model.eval()(input_ids=torch.tensor(INPUT_IDS), use_cache=False).logits
    return cast(Values, found.numpy())


def written_by_the_package(source: Path, folder: Path, name: str) -> Path:
    """Quantize transformers' model of `source` and save it, config and all, as the package's users do."""
    model = reference_model(source)
    scheme = scheme_of(name)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=IGNORED)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            for part, values in grid(module.weight.data, scheme).items():
                if hasattr(module, part):
                    getattr(module, part).data = values
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=scheme.format)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_package_writes_means_here_what_it_means_there(
    name: str, kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, settings(name), peer(name))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("name", FORMATS)
def test_experts_that_it_writes_give_the_logits_of_the_reference_with_their_values(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, settings(name), peer(name))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_that_it_saves_gives_the_logits_that_transformers_reads_from_it(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    folder = written_by_the_package(checkpoint("dense_vl", layers=2, interval=2), tmp_path / "saved", name)
    convert(folder, tmp_path / "out", dequantize=True, dtype="float32")
    expected, actual = logits_of_transformers(folder), logits(tmp_path / "out")
    tolerance = 2.0**-8 if name == "nvfp4" else 1e-4  # the package's unpacking multiplies nvfp4 in bf16
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_experts_that_it_writes_give_the_logits_that_transformers_reads_from_them(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("moe", layers=2, interval=2), tmp_path, settings(name), peer(name))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    expected, actual = logits_of_transformers(foreign), logits(tmp_path / "out")
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int8", 8), ("int8 unpacked", 8)])
def test_its_integers_are_kept_without_loss(
    name: str, bits: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source, encoder = checkpoint("moe", layers=2, interval=2), peer(name, scale_dtype=torch.bfloat16)
    foreign, plain = foreign_checkpoint(source, tmp_path, settings(name), encoder)
    report = convert(foreign, tmp_path / "out")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert len(report.kept_codes) == 19
    assert report.rounded_scales == ()
    for kept in report.kept_codes:
        assert equal(dequantized(written, kept, bits), expected[kept]), kept
