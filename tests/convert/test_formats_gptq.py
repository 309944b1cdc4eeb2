"""GPTQ checkpoints convert to what they stand for, and by default keep the codes that GPTQ chose."""

import re
import warnings
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
    checkpoint_format: str | None = "gptq"
    stored_less: int | None = None
    """How much less than the zeros is stored, by default what `checkpoint_format` says."""

    @property
    def settings(self) -> dict[str, object]:
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.symmetric,
            "desc_act": self.act_order,
            **({} if self.checkpoint_format is None else {"checkpoint_format": self.checkpoint_format}),
            "dynamic": {"-:.*attn.*": {}, "-:lm_head": {}},
        }

    def __call__(self, weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        K = weight.shape[1]
        groups = np.arange(K) // (K if self.group_size == -1 else self.group_size)
        if self.act_order:
            groups = np.random.default_rng(0).permutation(groups)
        found = nearest(weight, groups, bits=self.bits, symmetric=self.symmetric, scale_dtype=self.scale_dtype)
        less = self.checkpoint_format == "gptq" if self.stored_less is None else self.stored_less
        stored_zeros = (found.zeros - less) & ((1 << self.bits) - 1)
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
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64), (4, -1), (2, 16), (3, 32), (4, 48)])
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


@pytest.mark.parametrize(
    "gptq", [GPTQ(), GPTQ(8, 64), GPTQ(3), GPTQ(2), GPTQ(checkpoint_format="gptq_v2"), GPTQ(group_size=-1)]
)
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


@pytest.mark.parametrize("stored_less", [0, 1])
@pytest.mark.parametrize("checkpoint_format", [None, "gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_codes_have_the_middle_as_zero_whichever_is_stored(
    bits: int, checkpoint_format: str | None, stored_less: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ(bits, checkpoint_format=checkpoint_format, stored_less=stored_less)
    foreign, plain = foreign_checkpoint(checkpoint("dense", layers=1), tmp_path, gptq.settings, gptq)
    disagree = checkpoint_format is not None and stored_less != (checkpoint_format == "gptq")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(foreign, tmp_path / "kept", dtype="float32")
    assert any("sym: true" in str(warning.message) for warning in caught) == disagree
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, kept = (main_arrays(tmp_path / name) for name in ("out", "kept"))
    expected = expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []
    name = f"language_model.{PROJECTION}.weight"
    assert equal(dequantized(kept, name, bits), expected[name])


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
@pytest.mark.parametrize(("named", "stored_less"), [("gptq", 1), ("gptq_v2", 0)])
def test_asymmetric_zeros_are_stored_as_either_key_declares(
    key: str, named: str, stored_less: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ(symmetric=False, checkpoint_format=None, stored_less=stored_less)
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, {**gptq.settings, key: named}, gptq)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


def test_stored_zeros_that_belong_to_no_symmetric_module_are_warned_of(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ(symmetric=False, checkpoint_format=None, stored_less=0)
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, {**gptq.settings, "sym": True}, gptq)
    with pytest.warns(UserWarning, match="zero points stored say another"):
        convert(foreign, tmp_path / "out")


def test_a_module_that_dynamic_sets_apart_is_read_by_its_own_settings(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    four, eight = GPTQ(), GPTQ(8, 64, symmetric=False)

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        return (eight if weight.shape[0] == 128 else four)(weight)  # gate and up

    apart = {"bits": 8, "group_size": 64, "sym": False}
    stated = {**four.settings, "dynamic": {"-:.*attn.*": {}, r"+:.*\.(gate|up)_proj": apart}}
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, stated, encode, chosen=mlp_only)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"group_size": 64}, "has 2 groups for 64 inputs, config.json says group_size 64"),
        ({"group_size": "32"}, "quantization_config.group_size is '32', expected a whole number"),
        ({"bits": 8}, "makes 4 bits; expected 8, as config.json says"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"dynamic": [1]}, "dynamic is "),
        ({"dynamic": {"+:(": {"bits": 8}}}, "no regular expression"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format is 'gptq' and 'gptq_v2'"),
    ],
)
def test_a_config_that_contradicts_the_weights_or_itself_is_refused(
    changed: dict[str, object], complaint: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    gptq = GPTQ()
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, {**gptq.settings, **changed}, gptq)
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        convert(foreign, tmp_path / "out")


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
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2900)
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
