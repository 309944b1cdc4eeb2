"""What the compressed-tensors package itself writes converts to what it reads back from it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from torch import Tensor

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.foreign import Encoder, Values, foreign_checkpoint
from tests.support.mlx_folders import expected_arrays, main_arrays

FORMATS: dict[str, tuple[str, dict[str, object]]] = {
    "int4": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "int4 asymmetric": (
        "pack-quantized",
        {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False},
    ),
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


def peer(kind: str, arguments: dict[str, object]) -> Encoder:
    """Scales, codes and the values they stand for, all by compressed-tensors; skips where it is not installed."""
    base: Any = pytest.importorskip("compressed_tensors.compressors.base")
    quantization: Any = pytest.importorskip("compressed_tensors.quantization")
    helpers: Any = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    weights = quantization.QuantizationArgs(**arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, format=kind)
    compressor = base.BaseCompressor.get_value_from_registry(kind)

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        group_size = weights.group_size or weight.shape[1]
        groups = weight.reshape(weight.shape[0], -1, group_size)
        state = {"weight": weight}
        if kind.startswith("nvfp4"):
            state["weight_global_scale"] = (448 * 6 / weight.abs().max()).reshape(1)
        state["weight_scale"], zeros = helpers.calculate_qparams(
            groups.amin(-1), groups.amax(-1), weights, state.get("weight_global_scale")
        )
        if not weights.symmetric:
            state["weight_zero_point"] = zeros
        stored = compressor.compress(dict(state), scheme)
        values = compressor.decompress(dict(stored), scheme)["weight"]
        return stored, values.float().numpy().astype(np.float32)

    return encode


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_package_writes_means_here_what_it_means_there(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    kind, arguments = FORMATS[name]
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**arguments, "scale_dtype": None}}},
    }
    source = checkpoint("dense", layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, settings, peer(kind, arguments))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    rounding = 2.0**-8 if name == "nvfp4" else 0.0  # of the package, which multiplies those in bf16
    for key, values in expected.items():
        difference = np.abs(np.array(written[key].astype(mx.float32)) - values.numpy())
        assert (difference <= 2 * rounding * np.abs(values.numpy())).all(), key
