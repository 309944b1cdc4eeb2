"""Every tensor lands in its place, bit for bit."""

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.layout import Mode
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import pieces
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS
from tests.support.mlx_folders import companion_arrays, digests, equal, expected_arrays, main_arrays

UNPACKED = ("in_proj_a", "in_proj_b", "in_proj_ba", "conv1d", "A_log", "dt_bias", "norm", "vision_tower", ".bias")
CAREFUL = ("mlp.gate", "shared_expert_gate")
MODES: list[tuple[Mode, int, int]] = [
    ("affine", 2, 32),
    ("affine", 4, 64),
    ("affine", 6, 128),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]


@pytest.mark.parametrize("kind", KINDS)
def test_unpacked_tensors_are_those_of_the_source_bit_for_bit(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind, with_mtp=True)
    convert(source, tmp_path / "out", quantize=False)
    written = main_arrays(tmp_path / "out") | companion_arrays(tmp_path / "out")
    expected = expected_arrays(source)
    assert written.keys() == expected.keys()
    assert [name for name in expected if not equal(written[name], expected[name])] == []


@pytest.mark.parametrize(("mode", "bits", "group_size"), MODES)
def test_rounded_to_nearest_packed_matrices_are_exactly_what_mlx_packs(
    mode: Mode, bits: int, group_size: int, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", dtype="bfloat16", tied=True)
    convert(source, tmp_path / "out", bits=bits, group_size=group_size, mode=mode, quantizer="rtn")
    written, compared = main_arrays(tmp_path / "out"), 0
    for name, tensor in expected_arrays(source).items():
        settings = {"bits": bits, "group_size": group_size, "mode": mode}
        if name.removesuffix(".weight").endswith(CAREFUL):
            settings = {"bits": 8, "group_size": 64}
        if any(part in name for part in UNPACKED) or tensor.shape[-1] % settings["group_size"]:
            assert written[name].dtype != mx.uint32, name
            continue
        dense = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
        for part, array in zip(("weight", "scales", "biases"), mx.quantize(dense, **settings), strict=False):
            assert mx.array_equal(written[f"{name.removesuffix('.weight')}.{part}"], array), (name, part)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("kind", ["moe_vl", "next"])
def test_the_mtp_layer_is_packed_to_eight_bits(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint(kind, with_mtp=True, dtype="bfloat16")
    convert(source, tmp_path / "out", bits=3, quantizer="rtn")
    written, expected = companion_arrays(tmp_path / "out"), expected_arrays(source)
    matrices = [name for name in expected if name.startswith("mtp.") and expected[name].ndim > 1]
    for name in matrices:
        dense = mx.array(expected[name].float().numpy()).astype(mx.bfloat16)
        assert mx.array_equal(written[name], mx.quantize(dense, bits=8, group_size=64)[0]), name
    assert len(matrices) > 10


def test_a_matrix_whose_columns_do_not_divide_stays_unpacked_and_is_reported(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    report = convert(checkpoint("dense"), tmp_path / "out", group_size=128)
    written = main_arrays(tmp_path / "out")
    assert "language_model.model.layers.0.mlp.gate_proj.weight" in report.indivisible
    assert all(written[name].dtype == mx.float32 for name in report.indivisible)
    assert written["language_model.model.layers.0.mlp.down_proj.weight"].dtype == mx.uint32


def test_pieces_smaller_than_a_tensor_give_the_same_files(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("moe_vl", with_mtp=True, dtype="bfloat16")
    convert(source, tmp_path / "whole")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2900)
    convert(source, tmp_path / "pieces")
    assert digests(tmp_path / "pieces") == digests(tmp_path / "whole")


@pytest.mark.parametrize("other", [{"fused_experts": True}, {"shard_size": "100KB"}])
def test_fused_experts_and_shards_of_the_source_change_nothing(
    other: dict[str, object], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint("moe"), tmp_path / "plain")
    convert(checkpoint("moe", **other), tmp_path / "other")
    plain, actual = digests(tmp_path / "plain"), digests(tmp_path / "other")
    assert {name: actual[name] for name in actual if name != "README.md"} == {
        name: plain[name] for name in plain if name != "README.md"
    }


def test_dtype_applies_to_all_but_decay_which_stays_in_fp32(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense_vl"), tmp_path / "out", quantize=False, dtype="float16")
    for name, array in main_arrays(tmp_path / "out").items():
        assert array.dtype == (mx.float32 if name.endswith("A_log") else mx.float16), name


def test_the_dtype_of_most_of_the_source_is_kept(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    report = convert(checkpoint("dense", dtype="bfloat16"), tmp_path / "out", quantize=False)
    norm = main_arrays(tmp_path / "out")["language_model.model.layers.0.linear_attn.norm.weight"]
    assert (report.dtype, norm.dtype) == ("bfloat16", mx.bfloat16)
