"""AWQ checkpoints convert to what they stand for, and by default keep the codes that AWQ chose."""

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
    logits,
)
from tests.support.integer_codes import Codes, Integers, little_endian, nearest
from tests.support.mlx_folders import dequantized, digests, equal, expected_arrays, main_arrays

PROJECTION = "model.layers.0.mlp.up_proj"
SETTINGS: dict[str, object] = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["visual"],
}


def codes_of(weight: Tensor, symmetric: bool = False) -> Codes:
    return nearest(weight, np.arange(weight.shape[1]) // 32, bits=4, symmetric=symmetric)


def interleaved(codes: Integers) -> Tensor:
    """Rows of codes in words of eight, the even ones of each eight in the lower half."""
    eights = codes.reshape(codes.shape[0], -1, 8)
    return torch.from_numpy(little_endian(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]], 4)[..., 0].copy())


def awq(*, symmetric: bool = False) -> Encoder:
    """AutoAWQ's "gemm" modules: everything by inputs × outputs."""

    def encode(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
        found = codes_of(weight, symmetric)
        parts = {"qweight": interleaved(found.codes.T), "qzeros": interleaved(found.zeros.T), "scales": found.scales.T}
        return parts, found.values

    return encode


def filled(array: Integers | Tensor, columns: int) -> torch.Tensor:
    """Columns of zeros behind those of a matrix."""
    tensor = torch.as_tensor(array)
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1]))


def gemv(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """AutoAWQ's "gemv" modules: along the inputs, zeros and scales filled up to whole words."""
    found = codes_of(weight)
    width = -(-found.zeros.shape[1] // 8) * 8 + 8
    zeros = filled(found.zeros.astype(np.int64), width).numpy().astype(found.zeros.dtype)
    words = {name: little_endian(codes.reshape(len(codes), -1, 8), 4)[..., 0] for name, codes in
             (("qweight", found.codes), ("qzeros", zeros))}  # fmt: skip
    parts = {name: torch.from_numpy(stored.copy()) for name, stored in words.items()}
    return parts | {"scales": filled(found.scales, width)}, found.values


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_awq_packed_for_gemv_holds_its_exact_values(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, {**SETTINGS, "version": "gemv"}, gemv)
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in written if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize("kind", ["dense", "moe_vl", "next"])
def test_awq_dequantized_holds_its_exact_values_and_gives_the_logits_of_the_reference(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint(kind), tmp_path, SETTINGS, awq())
    convert(foreign, tmp_path / "out", dequantize=True, dtype="float32")
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert [name for name in written if not equal(written[name], expected[name])] == []
    assert_reference_logits(tmp_path / "out", plain)


@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_codes_are_kept_bit_for_bit(symmetric: bool, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    foreign, _ = foreign_checkpoint(source, tmp_path, SETTINGS, awq(symmetric=symmetric))
    convert(foreign, tmp_path / "out")
    expected = codes_of(stored_tensors(source)[f"{PROJECTION}.weight"], symmetric).codes
    written = np.array(main_arrays(tmp_path / "out")[f"language_model.{PROJECTION}.weight"])
    assert np.array_equal(written.view(np.int32), little_endian(expected, 4))


@pytest.mark.parametrize(("symmetric", "dtype"), [(True, "float16"), (False, "float32")])
def test_awq_is_repacked_without_loss_where_the_dtype_holds_its_biases(
    symmetric: bool, dtype: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("moe"), tmp_path, SETTINGS, awq(symmetric=symmetric))
    report = convert(foreign, tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(plain)
    assert len(report.kept_codes) == 4 * 3 + 4 * 3 + 3 * 3 + 4
    assert report.rounded_scales == ()
    assert [name for name in report.kept_codes if not equal(dequantized(written, name, 4), expected[name])] == []


def test_awq_zeros_that_a_narrow_dtype_rounds_are_reported(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, SETTINGS, awq())
    report = convert(foreign, tmp_path / "out", dtype="float16")
    assert report.rounded_scales
    assert "rounded to float16" in report.table()


def test_kept_awq_codes_run_as_they_stand(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, SETTINGS, awq())
    convert(foreign, tmp_path / "out", dtype="float32")
    convert(tmp_path / "out", tmp_path / "dense", dequantize=True)
    actual, expected = (logits(tmp_path / name) for name in ("out", "dense"))
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("dequantize", [False, True])
def test_pieces_that_begin_inside_a_word_change_nothing(
    dequantize: bool, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("moe"), tmp_path, SETTINGS, awq())
    convert(foreign, tmp_path / "whole", dequantize=dequantize)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2900)
    convert(foreign, tmp_path / "pieces", dequantize=dequantize)
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


def test_modules_left_out_of_awq_stay_as_they_are(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense_vl", dtype="bfloat16")
    foreign, _ = foreign_checkpoint(
        source, tmp_path, SETTINGS, awq(), chosen=lambda name: every_projection(name) and "linear_attn" not in name
    )
    convert(foreign, tmp_path / "out", dequantize=True)
    written, expected = main_arrays(tmp_path / "out"), expected_arrays(source)
    untouched = [name for name in written if "vision" in name or "linear_attn.in_proj" in name or "embed" in name]
    assert len(untouched) > 20
    assert all(equal(written[name], expected[name]) for name in untouched)


@pytest.mark.parametrize(
    ("part", "replacement", "complaint"),
    [
        ("scales", torch.ones(2, 120), r"up_proj\.scales .* \[2, 120\], expected \[2, 128\]"),
        ("qzeros", torch.ones(3, 16, dtype=torch.int32), r"qzeros .* \[3, 16\], expected \[2, 16\]"),
        ("qzeros", None, r"without .*up_proj\.qzeros"),
    ],
)
def test_damaged_modules_are_named(
    part: str, replacement: Tensor | None, complaint: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, SETTINGS, awq())

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PROJECTION}.{part}"]
        if replacement is not None:
            tensors[f"{PROJECTION}.{part}"] = replacement

    edit_tensors(foreign, damage)
    with pytest.raises(CheckpointError, match=complaint):
        convert(foreign, tmp_path / "out")


@pytest.mark.parametrize("other", [{"version": "gemv_fast"}, {"bits": 8}])
def test_other_awq_packings_are_refused(
    other: dict[str, object], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    foreign, _ = foreign_checkpoint(checkpoint("dense"), tmp_path, {**SETTINGS, **other}, awq())
    with pytest.raises(CheckpointError, match="expected 4 bits in 'gemm'"):
        convert(foreign, tmp_path / "out")


def test_awq_on_request_is_packed_in_another_precision(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    foreign, plain = foreign_checkpoint(checkpoint("dense"), tmp_path, SETTINGS, awq())
    with pytest.warns(UserWarning, match="packed again"):
        convert(foreign, tmp_path / "out", mode="mxfp4")
    convert(plain, tmp_path / "expected", mode="mxfp4")
    out, expected = main_arrays(tmp_path / "out"), main_arrays(tmp_path / "expected")
    assert [name for name in expected if not mx.array_equal(out[name], expected[name])] == []
