"""The companion file holds exactly what other MLX runtimes could not read or would compute with too slowly."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_qwen.convert import convert
from tests.conftest import CheckpointFactory
from tests.support.mlx_folders import companion_arrays, digests, equal, expected_arrays, main_arrays


def test_norms_are_exact_in_the_companion_and_rounded_in_the_main_file(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense", dtype="bfloat16")
    convert(source, tmp_path / "out")
    main, companion, expected = (
        main_arrays(tmp_path / "out"),
        companion_arrays(tmp_path / "out"),
        expected_arrays(source),
    )
    norms = [name for name in expected if "norm" in name]
    assert companion.keys() == set(norms)
    for name in norms:
        assert companion[name].dtype == mx.float32 and equal(companion[name], expected[name]), name
        assert main[name].dtype == mx.bfloat16 and equal(main[name], expected[name].bfloat16()), name


def test_dt_bias_that_rounding_would_change_is_kept_exactly(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    convert(source, tmp_path / "out", dtype="bfloat16")
    name = "language_model.model.layers.1.linear_attn.dt_bias"
    assert equal(companion_arrays(tmp_path / "out")[name], expected_arrays(source)[name])
    assert main_arrays(tmp_path / "out")[name].dtype == mx.bfloat16


def test_in_fp32_without_mtp_there_is_nothing_to_keep_apart(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    assert list((tmp_path / "out").glob("mlx-qwen*")) == []


def test_the_mtp_layer_is_in_the_companion_only(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("next", with_mtp=True)
    convert(source, tmp_path / "out", quantize=False)
    mtp = {name for name in expected_arrays(source) if name.startswith("mtp.")}
    assert companion_arrays(tmp_path / "out").keys() == mtp
    assert not mtp & main_arrays(tmp_path / "out").keys()


def with_fused_mtp_experts(source: Path, folder: Path) -> Path:
    """A copy of `source` whose MTP layer has all experts in `gate_up_proj` and `down_proj`, as Qwen3.6 stores them."""
    shutil.copytree(source, folder)
    shard, experts = folder / "model-mtp.safetensors", "mtp.layers.0.mlp.experts."
    tensors = load_file(shard)
    gate, up, down = (
        torch.stack([tensors.pop(f"{experts}{i}.{name}_proj.weight") for i in range(8)])
        for name in ("gate", "up", "down")
    )
    assert not any(name.startswith(experts) for name in tensors)
    tensors |= {f"{experts}gate_up_proj": torch.cat([gate, up], dim=1), f"{experts}down_proj": down}
    save_file(tensors, shard)
    index_file = folder / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    others = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index_file.write_text(json.dumps({**index, "weight_map": others | dict.fromkeys(tensors, shard.name)}))
    return folder


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("kind", ["moe", "moe_vl"])
def test_mtp_experts_in_one_tensor_give_the_companion_that_single_ones_give(
    kind: str, quantize: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    single = checkpoint(kind, with_mtp=True, dtype="bfloat16")
    fused = with_fused_mtp_experts(single, tmp_path / "fused")
    for name, source in (("single-out", single), ("fused-out", fused)):
        convert(source, tmp_path / name, quantize=quantize)
    assert "mtp.layers.0.mlp.switch_mlp.down_proj.weight" in companion_arrays(tmp_path / "fused-out")
    files = [digests(tmp_path / f"{name}-out") for name in ("single", "fused")]
    for file in ("mlx-qwen.safetensors", "model.safetensors", "config.json"):
        assert files[0][file] == files[1][file], file


def test_converting_a_converted_folder_again_loses_nothing(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("moe_vl", with_mtp=True, dtype="bfloat16"), tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    for arrays in (main_arrays, companion_arrays):
        once, twice = arrays(tmp_path / "once"), arrays(tmp_path / "twice")
        assert once.keys() == twice.keys()
        assert all(mx.array_equal(once[name], twice[name]) for name in once)
