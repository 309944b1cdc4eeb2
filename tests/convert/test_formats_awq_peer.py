"""What the packers of AutoAWQ and AutoRound write converts to what they read back from it.

Both ask for hundreds of megabytes that packing has no use for, so these tests run where they are installed without:
`pip install --no-deps autoawq auto-round py-cpuinfo`.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlx_qwen.convert import convert
from mlx_qwen.convert.settings import DType
from tests.conftest import CheckpointFactory
from tests.support.foreign import Encoder, Values, assert_reference_logits, foreign_checkpoint
from tests.support.integer_codes import nearest
from tests.support.mlx_folders import dequantized, equal, expected_arrays, main_arrays

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # it is maintained no longer
    auto_awq: Any = pytest.importorskip("awq.modules.linear.gemm")
auto_round: Any = pytest.importorskip("auto_round.export.export_to_awq.utils")

GROUP = 32
AS_AWQ: dict[str, object] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": GROUP,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["visual"],
}
AS_AUTO_ROUND: dict[str, object] = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_awq",
    "bits": 4,
    "group_size": GROUP,
    "sym": False,
    "data_type": "int",
}
PACKERS: dict[str, tuple[dict[str, object], Any]] = {
    "AutoAWQ": (AS_AWQ, auto_awq),
    "AutoRound, as AWQ": (AS_AWQ, auto_round),
    "AutoRound": (AS_AUTO_ROUND, auto_round),
}


def packer(name: str, *, symmetric: bool = False) -> tuple[dict[str, object], Encoder]:
    """The `quantization_config`, and words and the values that they stand for, by `WQLinear_GEMM` of the package."""
    settings, package = PACKERS[name]

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        N, K = weight.shape
        found = nearest(weight, np.arange(K) // GROUP, bits=4, symmetric=symmetric)
        linear = nn.Linear(K, N, bias=False)
        linear.weight.data = torch.from_numpy(found.values)
        zeros = torch.from_numpy(found.zeros).T.contiguous()
        layer = package.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=found.scales.T.contiguous(), zeros=zeros)
        values = package.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP)
        return dict(layer.state_dict()), values.T.contiguous().numpy()

    return settings, encode


@pytest.mark.parametrize("kind", ["dense", "moe_vl", "next"])
@pytest.mark.parametrize("name", PACKERS)
def test_what_a_packer_writes_means_here_what_it_means_there(
    name: str, kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint(kind, layers=2, interval=2), tmp_path, *packer(name))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("name", PACKERS)
def test_converted_it_gives_the_logits_of_the_reference_with_its_values(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe", layers=2, interval=2), tmp_path, *packer(name))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize(("symmetric", "dtype"), [(True, "float16"), (False, "float32")])
@pytest.mark.parametrize("name", PACKERS)
def test_codes_of_a_packer_are_repacked_without_loss(
    name: str, symmetric: bool, dtype: DType, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, *packer(name, symmetric=symmetric))
    report = convert(foreign, tmp_path / "out", dtype=dtype)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert len(report.kept_codes) == 19
    assert report.rounded_scales == ()
    for kept in report.kept_codes:
        assert equal(dequantized(written, kept, 4), expected[kept]), kept
