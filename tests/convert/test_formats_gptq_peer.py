"""What the packers of GPTQModel and AutoRound write converts to what they read back from it.

Both ask for hundreds of megabytes that packing has no use for, so these tests run where they are installed without:
`pip install --no-deps auto-round py-cpuinfo gptqmodel defuser device-smi logbar pypcre tokenicer threadpoolctl`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import stored_tensors
from tests.support.foreign import Encoder, Values, assert_reference_logits, foreign_checkpoint
from tests.support.integer_codes import Codes, nearest
from tests.support.mlx_folders import dequantized, equal, expected_arrays, main_arrays

gptqmodel: Any = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
gptqmodel_formats: Any = pytest.importorskip("gptqmodel.utils.model")
gptqmodel_settings: Any = pytest.importorskip("gptqmodel.quantization")
auto_round: Any = pytest.importorskip("auto_round_extension.torch.qlinear_torch")
auto_round_as_gptq: Any = pytest.importorskip("auto_round_extension.torch.qlinear_torch_zp")

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Grid:
    """The precision of a checkpoint; `act_order` gives the columns of each group at random."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False

    def groups(self, K: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        groups = np.arange(K) // (K if self.group_size == -1 else self.group_size)
        return np.random.default_rng(0).permutation(groups) if self.act_order else groups

    def codes(self, weight: Tensor) -> Codes:
        return nearest(weight, self.groups(weight.shape[1]), bits=self.bits, symmetric=self.symmetric)


Packer = Callable[[Grid], tuple[dict[str, object], Encoder]]


def as_gptqmodel(checkpoint_format: str) -> Packer:
    """GPTQModel's `TorchLinear`, which packs zeros as they are, and as they are less one for the format "gptq"."""

    def packer(grid: Grid) -> tuple[dict[str, object], Encoder]:
        def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
            (N, K), found = weight.shape, grid.codes(weight)
            layer = gptqmodel.TorchLinear(grid.bits, grid.group_size, grid.symmetric, grid.act_order, K, N)
            # The compiled packer would be built first.
            layer.pack_original(
                linear_of(found), found.scales, torch.from_numpy(found.zeros), torch.from_numpy(grid.groups(K)).int()
            )
            stored = {part: getattr(layer, part).clone() for part in PARTS}
            layer.scales = layer.scales.float()
            values = layer.dequantize_weight().T.contiguous().numpy()
            if checkpoint_format == "gptq":
                settings = gptqmodel_settings.QuantizeConfig(bits=grid.bits)
                gptqmodel_formats.convert_gptq_v2_to_v1_format_module(layer, settings)
                stored["qzeros"] = layer.qzeros
            return stored, values

        return gptq_settings(grid, checkpoint_format), encode

    return packer


def as_auto_round(layers: Any) -> Packer:
    """AutoRound's `QuantLinear`: zeros less one as "gptq" has them, or as they are in a format of its own."""

    def packer(grid: Grid) -> tuple[dict[str, object], Encoder]:
        def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
            (N, K), found = weight.shape, grid.codes(weight)
            layer = layers.QuantLinear(grid.bits, grid.group_size, K, N, bias=False, g_idx=True)
            layer.device = "cpu"
            layer.pack(linear_of(found), found.scales, torch.from_numpy(found.zeros), device="cpu")
            stored = {part: getattr(layer, part) for part in PARTS}
            # With it, only layers of as many outputs as inputs are read.
            del layer.g_idx
            layer.scales = layer.scales.float()
            return stored, layer(torch.eye(K)).T.contiguous().numpy()

        if layers is auto_round_as_gptq:
            return gptq_settings(grid, "gptq"), encode
        common = {"bits": grid.bits, "group_size": grid.group_size, "sym": grid.symmetric, "data_type": "int"}
        return {"quant_method": "auto-round", "packing_format": "auto_round", **common}, encode

    return packer


def linear_of(found: Codes) -> nn.Linear:
    """The layer as it is before it is packed: its weights already on the grid."""
    linear = nn.Linear(*found.values.shape[::-1], bias=False)
    linear.weight.data = torch.from_numpy(found.values)
    return linear


def gptq_settings(grid: Grid, checkpoint_format: str) -> dict[str, object]:
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.symmetric,
        "desc_act": grid.act_order,
        "checkpoint_format": checkpoint_format,
    }


PACKERS = {
    "GPTQModel": as_gptqmodel("gptq"),
    "GPTQModel, v2": as_gptqmodel("gptq_v2"),
    "AutoRound, as GPTQ": as_auto_round(auto_round_as_gptq),
    "AutoRound": as_auto_round(auto_round),
}
GRIDS = [
    Grid(bits, size, symmetric) for bits, size in ((4, 32), (8, 64), (4, -1), (2, 16)) for symmetric in (True, False)
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", PACKERS)
def test_what_a_packer_writes_means_here_what_it_means_there(
    name: str, grid: Grid, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense", layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, *PACKERS[name](grid))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["GPTQModel", "GPTQModel, v2"])
def test_columns_out_of_order_mean_here_what_they_mean_there(
    name: str, symmetric: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    grid = Grid(symmetric=symmetric, act_order=True)
    foreign, plain = foreign_checkpoint(checkpoint("moe", layers=2, interval=2), tmp_path, *PACKERS[name](grid))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("kind", ["moe_vl", "next"])
@pytest.mark.parametrize("name", PACKERS)
def test_converted_it_gives_the_logits_of_the_reference_with_its_values(
    name: str, kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    grid = Grid(symmetric=False)
    foreign, plain = foreign_checkpoint(checkpoint(kind, layers=2, interval=2), tmp_path, *PACKERS[name](grid))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("grid", [Grid(), Grid(8, 64), Grid(4, -1)], ids=str)
@pytest.mark.parametrize("name", PACKERS)
def test_symmetric_codes_of_a_packer_are_kept_bit_for_bit(
    name: str, grid: Grid, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", layers=2, interval=2)
    foreign, plain = foreign_checkpoint(source, tmp_path, *PACKERS[name](grid))
    report = convert(foreign, tmp_path / "out", dtype="float16")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    words = stored_tensors(foreign)["model.layers.0.mlp.shared_expert.up_proj.qweight"].numpy().view(np.uint32)
    assert np.array_equal(np.array(written["language_model.model.layers.0.mlp.shared_expert.up_proj.weight"]), words.T)
    assert len(report.kept_codes) == 19
    assert report.rounded_scales == ()
    for kept in report.kept_codes:
        assert equal(dequantized(written, kept, grid.bits), expected[kept]), kept
