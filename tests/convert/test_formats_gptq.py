"""GPTQ checkpoints convert to what they stand for, and by default keep the codes that GPTQ chose."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.convert import convert
from mlx_qwen.convert.work import pieces
from mlx_qwen.errors import CheckpointError
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import stored_tensors
from tests.support.foreign import (
    INPUT_IDS,
    Values,
    assert_reference_logits,
    edit_tensors,
    every_projection,
    foreign_checkpoint,
    logits,
)
from tests.support.integer_codes import little_endian, nearest
from tests.support.mlx_folders import dequantized, digests, equal, expected_arrays, main_arrays

PROJECTION = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class GPTQ:
    """Writes a weight [N, K] as AutoGPTQ does; `act_order` gives the columns of each group at random."""

    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    act_order: bool = False
    scale_dtype: torch.dtype = torch.float16
    checkpoint_format: str = "gptq"

    @property
    def settings(self) -> dict[str, object]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            "checkpoint_format": self.checkpoint_format,
            "dynamic": {"-:.*attn.*": {}, "-:lm_head": {}},
        }

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        K = weight.shape[1]
        groups = np.arange(K) // (K if self.group_size == -1 else self.group_size)
        if self.act_order:
            groups = np.random.default_rng(0).permutation(groups)
        found = nearest(weight, groups, bits=self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)
        stored_zeros = found.zeros - (self.checkpoint_format == "gptq")
        return {
            "qweight": torch.from_numpy(little_endian(found.codes, self.bits).T.copy()),
            "qzeros": torch.from_numpy(little_endian(stored_zeros.T, self.bits)),
            "scales": found.scales.T,
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }, found.values


def mlp_only(name: str) -> bool:
    """What the official checkpoints quantize."""
    return every_projection(name) and ".mlp." in name and "shared_expert" not in name


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (4, -1), (2, 16)])
def test_dequantizing_gptq_gives_scale_times_code_less_zero_exactly(
    bits: int, group_size: int, symmetric: bool, act_order: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ(bits, group_size, symmetric, act_order)
    foreign, plain = foreign_checkpoint(checkpoint("dense", layers=2, interval=2), tmp_path, gptq.settings, gptq)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize("kind", ["dense", "moe_vl", "next"])
def test_gptq_converted_gives_the_logits_of_the_reference_with_its_values(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ(act_order=True)
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, gptq.settings, gptq)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("gptq", [GPTQ(), GPTQ(8, 64), GPTQ(checkpoint_format="gptq_v2"), GPTQ(group_size=-1)])
@pytest.mark.parametrize("kind", ["dense", "moe_vl"])
def test_symmetric_codes_are_kept_bit_for_bit(
    kind: str, gptq: GPTQ, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, gptq.settings, gptq, chosen=mlp_only)
    report = convert(foreign, tmp_path / "out", dtype="float16")
    assert len(report.kept_codes) == 12
    assert report.rounded_scales == ()
    assert "12 matrices, without loss" in report.table()
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [
        name for name in report.kept_codes if not equal(dequantized(written, name, gptq.bits), expected[name])
    ] == []


def test_kept_words_are_the_stored_words_turned(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq = GPTQ(group_size=64)
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, gptq.settings, gptq)
    convert(foreign, tmp_path / "out")
    stored = stored_tensors(foreign)[f"{PROJECTION}.qweight"].numpy().view(np.uint32)
    written = main_arrays(tmp_path / "out")[f"language_model.{PROJECTION}.weight"]
    assert np.array_equal(np.array(written), stored.T)


def test_kept_codes_run_as_they_stand(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    """The logits of a folder with kept codes are those of the same folder dequantized."""
    gptq = GPTQ(symmetric=False)
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, gptq.settings, gptq)
    report = convert(foreign, tmp_path / "out", dtype="float32")
    convert(tmp_path / "out", tmp_path / "dense", dequantize=True)
    assert len(report.kept_codes) > 20
    actual, expected = (logits(tmp_path / name) for name in ("out", "dense"))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def test_kept_codes_run_in_mlx_lm(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
    gptq = GPTQ()
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, gptq.settings, gptq, chosen=mlp_only)
    convert(foreign, tmp_path / "out", dtype="float32")
    actual = np.array(mlx_lm_utils.load_model(tmp_path / "out")[0](mx.array(INPUT_IDS)))
    expected = logits(tmp_path / "out")
    assert np.abs(actual - expected).max() <= 1e-3 * np.abs(expected).max()


def test_scales_that_the_dtype_cannot_hold_are_reported(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq = GPTQ()
    foreign, _ = foreign_checkpoint(checkpoint("dense", dtype="bfloat16"), tmp_path, gptq.settings, gptq)
    report = convert(foreign, tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert set(report.rounded_scales) == set(report.kept_codes) != set()
    assert f"of {len(report.kept_codes)} the scales or biases were rounded to bfloat16" in report.table()


def test_scales_in_bf16_are_kept_without_loss_in_a_bf16_model(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq = GPTQ(scale_dtype=torch.bfloat16)
    foreign, _ = foreign_checkpoint(checkpoint("dense", dtype="bfloat16"), tmp_path, gptq.settings, gptq)
    report = convert(foreign, tmp_path / "out")
    assert report.kept_codes
    assert report.rounded_scales == ()


@pytest.mark.parametrize("gptq", [GPTQ(act_order=True), GPTQ(group_size=16)])
def test_codes_that_mlx_cannot_hold_are_packed_again(gptq: GPTQ, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, gptq.settings, gptq)
    with pytest.warns(UserWarning, match="packed again"):
        report = convert(foreign, tmp_path / "out")
    convert(plain, tmp_path / "expected")
    out, expected = main_arrays(tmp_path / "out"), main_arrays(tmp_path / "expected")
    assert report.kept_codes == ()
    assert [name for name in expected if not mx.array_equal(out[name], expected[name])] == []


def test_another_precision_on_request_packs_again(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq = GPTQ()
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, gptq.settings, gptq)
    with pytest.warns(UserWarning, match="packed again"):
        assert convert(foreign, tmp_path / "eight", bits=8).kept_codes == ()
    convert(plain, tmp_path / "expected", bits=8)
    assert digests(tmp_path / "eight")["model.safetensors"] == digests(tmp_path / "expected")["model.safetensors"]
    assert convert(foreign, tmp_path / "same", bits=4, group_size=32).kept_codes != ()


def test_experts_of_which_one_is_left_out_are_packed_again_together(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ()
    foreign, plain = foreign_checkpoint(
        checkpoint("moe"), tmp_path, gptq.settings, gptq, chosen=lambda name: mlp_only(name) and "s.3.up" not in name
    )
    with pytest.warns(UserWarning, match="packed again"):
        report = convert(foreign, tmp_path / "out")
    convert(foreign, tmp_path / "dense", dequantize=True, dtype="float32")
    assert {name.split(".")[-2] for name in report.kept_codes} == {"down_proj"}
    dense, expected = main_arrays(tmp_path / "dense"), expected_arrays(plain)
    assert [name for name in expected if not equal(dense[name], expected[name])] == []


def test_modules_that_dynamic_leaves_out_stay_as_they_are(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq, source = GPTQ(), checkpoint("moe_vl", dtype="bfloat16", with_mtp=True)
    foreign, _ = foreign_checkpoint(source, tmp_path, gptq.settings, gptq, chosen=mlp_only)
    convert(foreign, tmp_path / "out", dequantize=True)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(source)
    untouched = [name for name in written if "vision" in name or "attn.in_proj" in name or "lm_head" in name]
    assert len(untouched) > 20
    assert all(equal(written[name], expected[name]) for name in untouched)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.filterwarnings("ignore:.*packed again")
def test_pieces_that_begin_inside_a_word_change_nothing(
    dequantize: bool, act_order: bool, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gptq = GPTQ(symmetric=False, act_order=act_order)
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, gptq.settings, gptq)
    convert(foreign, tmp_path / "whole", dequantize=dequantize)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 900)
    convert(foreign, tmp_path / "pieces", dequantize=dequantize)
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


@pytest.mark.parametrize(
    ("part", "replacement", "complaint"),
    [
        ("scales", torch.ones(3, 128), r"qzeros .* \[2, 16\], expected \[3, 16\]"),
        ("scales", None, r"without .*up_proj\.scales"),
        ("qzeros", torch.ones(2, 128, dtype=torch.int32), r"qzeros .* \[2, 128\], expected \[2, 16\]"),
        ("g_idx", torch.full((64,), 9, dtype=torch.int32), "names groups beyond the 2"),
        ("qweight", torch.ones(6, 128, dtype=torch.int32), "makes 3 bits"),
    ],
)
def test_damaged_modules_are_named(
    part: str, replacement: Tensor | None, complaint: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ()
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, gptq.settings, gptq)

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PROJECTION}.{part}"]
        if replacement is not None:
            tensors[f"{PROJECTION}.{part}"] = replacement

    edit_tensors(foreign, damage)
    with pytest.raises(CheckpointError, match=complaint):
        convert(foreign, tmp_path / "out")


def test_other_gptq_formats_are_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    gptq = GPTQ()
    settings = {**gptq.settings, "checkpoint_format": "marlin"}
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, settings, gptq)
    with pytest.raises(CheckpointError, match="checkpoint_format is 'marlin'"):
        convert(foreign, tmp_path / "out")
