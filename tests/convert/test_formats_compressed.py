"""compressed-tensors checkpoints convert to what they stand for, whichever of its formats they use."""

from collections.abc import Callable
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
    Encoder,
    Values,
    assert_reference_logits,
    edit_tensors,
    every_projection,
    foreign_checkpoint,
)
from tests.support.integer_codes import little_endian, nearest
from tests.support.mlx_folders import dequantized, digests, equal, expected_arrays, main_arrays

PROJECTION = "model.layers.0.mlp.up_proj"
Stored = tuple[dict[str, Tensor], Values]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def settings(name: str, **weights: object) -> dict[str, object]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}


def packed(bits: int = 4, group_size: int = 32, *, symmetric: bool = True, act_order: bool = False) -> Encoder:
    """pack-quantized: signed codes with half their range added, along the inputs; zeros along the outputs."""

    def encode(weight: Tensor) -> Stored:
        N, K = weight.shape
        groups = np.arange(K) // (group_size if group_size > 0 else K)
        if act_order:
            groups = np.random.default_rng(1).permutation(groups)
        found = nearest(weight, groups, bits=bits, symmetric=symmetric, scale_dtype=torch.bfloat16)
        parts = {
            "weight_packed": torch.from_numpy(little_endian(found.codes, bits)),
            "weight_scale": found.scales,
            "weight_shape": torch.tensor([N, K]),
        }
        if not symmetric:
            parts["weight_zero_point"] = torch.from_numpy(little_endian(found.zeros.T, bits).T.copy())
        if act_order:
            parts["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return parts, found.values

    return encode


def int8(*, symmetric: bool) -> Encoder:
    """int-quantized: signed bytes with one scale a row."""

    def encode(weight: Tensor) -> Stored:
        groups = np.zeros(weight.shape[1], np.int64)
        found = nearest(weight, groups, bits=8, symmetric=symmetric, scale_dtype=torch.bfloat16)
        parts = {"weight": torch.from_numpy(found.codes - 128).to(torch.int8), "weight_scale": found.scales}
        if not symmetric:
            parts["weight_zero_point"] = torch.from_numpy(found.zeros - 128).to(torch.int8)
        return parts, found.values

    return encode


def fp8(strategy: str) -> Encoder:
    """float-quantized: e4m3 with a scale for the tensor, a row, or a block of 32 × 16."""

    def encode(weight: Tensor) -> Stored:
        N, K = weight.shape
        rows, columns = {"tensor": (N, K), "channel": (1, K), "block": (32, 16)}[strategy]
        blocks = weight.reshape(N // rows, rows, K // columns, columns)
        scales = (blocks.abs().amax(dim=(1, 3)) / 448).to(torch.bfloat16)
        spread = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scales.reshape(1) if strategy == "tensor" else scales
        parts = {"weight": codes, "weight_scale": stored, "input_scale": torch.ones(1)}
        return parts, (codes.float() * spread).numpy()

    return encode


def nvfp4(weight: Tensor) -> Stored:
    """nvfp4-pack-quantized: two e2m1 numbers a byte, e4m3 scales of 16 inputs, and one number that divides them."""
    N, K = weight.shape
    global_scale = torch.tensor([448 * 6 / weight.abs().max()])
    groups = weight.reshape(N, K // 16, 16)
    scales = (groups.abs().amax(-1) / 6 * global_scale).to(torch.float8_e4m3fn)
    steps = (scales.float() / global_scale)[..., None]
    codes = (groups[..., None] / steps[..., None] - E2M1).abs().argmin(-1).reshape(N, K)
    values = E2M1[codes].reshape(groups.shape) * steps
    parts = {
        "weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_global_scale": global_scale,
        "input_global_scale": torch.ones(1),
    }
    return parts, values.reshape(N, K).numpy()


def mx_scales(weight: Tensor, largest_exponent: int) -> tuple[Tensor, Tensor]:
    """e8m0 scales of 32 inputs, and the powers of two that they stand for, by the OCP's microscaling formats."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    exponents = groups.abs().amax(-1).clamp_min(2.0**-100).log2().floor().to(torch.int32) - largest_exponent
    return (exponents + 127).to(torch.uint8), 2.0 ** exponents.double()


def mxfp4(weight: Tensor) -> Stored:
    """mxfp4-pack-quantized: two e2m1 numbers a byte, and e8m0 scales."""
    stored, scales = mx_scales(weight, 2)
    groups = weight.reshape(weight.shape[0], -1, 32)
    codes = (groups[..., None] / scales[..., None, None] - E2M1).abs().argmin(-1)
    values, flat = E2M1[codes] * scales[..., None], codes.reshape(weight.shape)
    parts = {"weight_packed": (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8), "weight_scale": stored}
    return parts, values.reshape(weight.shape).float().numpy()


def mxfp8(weight: Tensor) -> Stored:
    """mxfp8-quantized: e4m3 numbers and e8m0 scales."""
    stored, scales = mx_scales(weight, 8)
    spread = scales.repeat_interleave(32, 1)
    codes = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": stored}, (codes.double() * spread).float().numpy()


PACK = settings("pack-quantized", num_bits=4, type="int")
FORMATS: dict[str, tuple[dict[str, object], Encoder]] = {
    "int4": (PACK, packed()),
    "int4 asymmetric": (PACK, packed(symmetric=False)),
    "int4 act-order": (PACK, packed(symmetric=False, act_order=True)),
    "int4 by channel": (PACK, packed(group_size=-1)),
    "int8 packed": (settings("pack-quantized", num_bits=8, type="int"), packed(8, 64)),
    "int8": (settings("int-quantized"), int8(symmetric=True)),
    "int8 asymmetric": (settings("int-quantized"), int8(symmetric=False)),
    "fp8 by tensor": (settings("float-quantized"), fp8("tensor")),
    "fp8 by channel": (settings("float-quantized"), fp8("channel")),
    "fp8 by block": (settings("float-quantized", block_structure=[32, 16]), fp8("block")),
    "nvfp4": (settings("nvfp4-pack-quantized"), nvfp4),
    "mxfp4": (settings("mxfp4-pack-quantized"), mxfp4),
    "mxfp8": (settings("mxfp8-quantized"), mxfp8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_dequantizing_gives_the_exact_values(name: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, *FORMATS[name])
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [key for key in expected if not equal(written[key], expected[key])] == []


@pytest.mark.parametrize("name", ["int4 asymmetric", "int8", "fp8 by channel", "nvfp4"])
def test_converted_it_gives_the_logits_of_the_reference_with_its_values(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe_vl"), tmp_path, *FORMATS[name])
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize(("name", "bits"), [("int4", 4), ("int4 by channel", 4), ("int8 packed", 8), ("int8", 8)])
def test_symmetric_integers_are_kept_without_loss(
    name: str, bits: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe", dtype="bfloat16"), tmp_path, *FORMATS[name])
    report = convert(foreign, tmp_path / "out")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert report.dtype == "bfloat16"
    assert len(report.kept_codes) == 37
    assert report.rounded_scales == ()
    for kept in report.kept_codes:
        assert equal(dequantized(written, kept, bits), expected[kept]), kept


def test_packed_words_are_written_as_they_are(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, *FORMATS["int4 asymmetric"])
    convert(foreign, tmp_path / "out")
    stored = stored_tensors(foreign)[f"{PROJECTION}.weight_packed"].numpy()
    written = np.array(main_arrays(tmp_path / "out")[f"language_model.{PROJECTION}.weight"])
    assert np.array_equal(written.view(np.int32), stored)


@pytest.mark.parametrize("name", ["int4 act-order", "fp8 by channel", "nvfp4"])
def test_what_mlx_cannot_hold_is_packed_like_its_values(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, *FORMATS[name])
    with pytest.warns(UserWarning, match="packed again"):
        report = convert(foreign, tmp_path / "out")
    convert(plain, tmp_path / "expected")
    out, expected = main_arrays(tmp_path / "out"), main_arrays(tmp_path / "expected")
    assert report.kept_codes == ()
    assert [key for key in expected if not mx.array_equal(out[key], expected[key])] == []


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_that_begin_anywhere_change_nothing(
    name: str, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense", layers=2, interval=2), tmp_path, *FORMATS[name])
    convert(foreign, tmp_path / "whole", dequantize=True)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2700)
    convert(foreign, tmp_path / "pieces", dequantize=True)
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


def test_ignored_modules_stay_as_they_are(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense_vl", dtype="bfloat16")

    def chosen(name: str) -> bool:
        return every_projection(name) and "linear_attn" not in name

    foreign, _ = foreign_checkpoint(source, tmp_path, *FORMATS["int4"], chosen=chosen)
    convert(foreign, tmp_path / "out", dequantize=True)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(source)
    untouched = [name for name in written if "vision" in name or "linear_attn.in_proj" in name or "embed" in name]
    assert len(untouched) > 20
    assert all(equal(written[name], expected[name]) for name in untouched)


def drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PROJECTION}.{part}"]

    return damage


def put(part: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{PROJECTION}.{part}": tensor})


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("int4", drop("weight_scale"), r"without .*up_proj\.weight_scale"),
        ("int4", put("weight_scale", torch.ones(100, 2)), r"\[100, 2\], expected \[128, 2\]"),
        ("int4", put("weight_scale", torch.ones(128, 3)), "has 3 groups for 64 inputs"),
        ("int4", put("weight_packed", torch.ones(128, 6, dtype=torch.int32)), "makes 3 bits"),
        ("int4 asymmetric", put("weight_zero_point", torch.ones(128, 2, dtype=torch.int32)), r"expected \[16, 2\]"),
        ("int8", put("weight_scale", torch.ones(128, 2)), r"\[128, 2\], expected \[128, 1\]"),
        ("fp8 by channel", drop("weight_scale"), r"without .*up_proj\.weight_scale"),
        ("fp8 by block", put("weight_scale", torch.ones(3, 4)), r"\[3, 4\], expected \[4, 4\]"),
        ("nvfp4", drop("weight_global_scale"), r"without .*up_proj\.weight_global_scale"),
        ("nvfp4", put("weight_scale", torch.ones(128, 3)), r"\[128, 3\], expected \[128, 4\]"),
    ],
)
def test_damaged_modules_are_named(
    name: str,
    damage: Callable[[dict[str, Tensor]], None],
    complaint: str,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, *FORMATS[name])
    edit_tensors(foreign, damage)
    with pytest.raises(CheckpointError, match=complaint):
        convert(foreign, tmp_path / "out")


@pytest.mark.parametrize(("group_size", "bits"), [(48, 4), (96, 4), (24, 8), (128, 4)])
def test_a_stated_group_size_that_does_not_divide_the_columns_leaves_a_shorter_last_group(
    group_size: int, bits: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    stated = settings("pack-quantized", num_bits=bits, type="int", strategy="group", group_size=group_size)
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, stated, packed(bits, group_size))
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


def test_a_shorter_last_group_keeps_codes_that_mlx_can_hold(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    stated = settings("pack-quantized", num_bits=4, type="int", strategy="group", group_size=96)
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, stated, packed(4, 96))
    report = convert(foreign, tmp_path / "out", dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert report.kept_codes
    assert [name for name in report.kept_codes if not equal(dequantized(written, name, 4), expected[name])] == []


def test_groups_of_two_sizes_are_told_apart_by_their_scales(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    def encode(weight: Tensor) -> Stored:
        return packed(8 if weight.shape == (128, 64) else 4, 16 if weight.shape == (128, 64) else 48)(weight)

    stated = settings("pack-quantized", num_bits=4, group_size=48)
    groups = {**stated["config_groups"], "group_1": {"weights": {"num_bits": 8, "group_size": 16}}}  # type: ignore[dict-item]
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, {**stated, "config_groups": groups}, encode)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


def test_a_group_size_that_the_scales_contradict_is_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    stated = settings("pack-quantized", num_bits=4, group_size=64)
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, stated, packed(4, 32))
    with pytest.raises(CheckpointError, match=r"has 2 groups for the 64 inputs of .*, config\.json says group_size 64"):
        convert(foreign, tmp_path / "out")


def rotated(*locations: str) -> dict[str, object]:
    applied = [{"location": location, "targets": ["Linear"]} for location in locations]
    return {"config_groups": {"R4": {"type": "hadamard", "apply": applied}}}


@pytest.mark.parametrize("location", ["input", "output", "q_attn", "k_cache"])
def test_rotations_of_activations_are_refused(location: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    stated = {**PACK, "transform_config": rotated("weight_input", location)}
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, stated, packed())
    with pytest.raises(CheckpointError, match=f"rotates {location} while the model runs"):
        convert(foreign, tmp_path / "out")


@pytest.mark.parametrize("transforms", [None, {}, rotated("weight_input", "weight_output")])
def test_rotations_that_are_part_of_the_weights_are_read_as_they_stand(
    transforms: object, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(
        checkpoint("dense", layers=1), tmp_path, {**PACK, "transform_config": transforms}, packed()
    )
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in expected if not equal(written[name], expected[name])] == []


def test_other_compressed_formats_are_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, settings("marlin-24"), packed())
    with pytest.raises(CheckpointError, match="format 'marlin-24', expected one of pack-quantized"):
        convert(foreign, tmp_path / "out")
