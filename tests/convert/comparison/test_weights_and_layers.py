"""The errors of tensors and hidden states show where a conversion lost what it lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.convert import compare, convert
from mlx_qwen.convert.comparison import tensors as comparison_tensors
from mlx_qwen.convert.recipes.kinds import Kind
from tests.conftest import CheckpointFactory
from tests.convert.comparison.conftest import TEXT, Perturb
from tests.support.foreign import Encoder, Values, foreign_checkpoint
from tests.support.integer_codes import little_endian, nearest
from tests.support.mlx_folders import dequantized, equal, expected_arrays, main_arrays
from tests.support.tokenizers import add_tokenizer

PREFIX = "language_model.model.layers"


def with_tokenizer(source: Path, folder: Path) -> Path:
    return add_tokenizer(shutil.copytree(source, folder))


@pytest.mark.parametrize("share", [0.5, 0.01])
def test_a_perturbed_tensor_is_the_worst_by_as_much_as_it_was_perturbed(
    reference: Path, perturbed: Perturb, share: float
) -> None:
    found = compare(reference, perturbed(reference, "model.layers.2.linear_attn.out_proj.weight", share), text=TEXT)
    (worst,) = found.worst()
    assert worst.name == f"{PREFIX}.2.linear_attn.out_proj.weight"
    assert (worst.layer, worst.kind) == (2, Kind.LINEAR_OUT)
    assert worst.relative == pytest.approx(share, rel=1e-3)
    assert f"{worst.relative:.5f}  {worst.name}" in found.table()


def test_hidden_states_differ_from_the_layer_on_whose_tensor_does(reference: Path, perturbed: Perturb) -> None:
    found = compare(reference, perturbed(reference, "model.layers.2.mlp.up_proj.weight", 0.2), text=TEXT)
    assert found.layers[:2] == (0, 0)
    assert min(found.layers[2:]) > 1e-3


def test_embeddings_make_all_hidden_states_differ(reference: Path, perturbed: Perturb) -> None:
    found = compare(reference, perturbed(reference, "model.embed_tokens.weight", 0.2), text=TEXT)
    assert min(found.layers) > 1e-3


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_quantized_tensors_error_is_that_of_what_it_stands_for(
    checkpoint: CheckpointFactory, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison_tensors, "_BLOCK_BYTES", 10_000)
    source = with_tokenizer(checkpoint(kind, with_mtp=True), tmp_path / "source")
    convert(source, tmp_path / "mlx", bits=4, group_size=32, progress=False)
    exact, written = expected_arrays(source), main_arrays(tmp_path / "mlx")
    found = {tensor.name: tensor for tensor in compare(source, tmp_path / "mlx", text=TEXT[:60]).tensors}
    assert set(found) == set(exact)
    packed = [name for name in written if name.removesuffix("weight") + "scales" in written]
    assert len(packed) > 20
    for name in packed:
        bits = written[name].shape[-1] * 32 // exact[name].shape[-1]
        actual, expected = np.array(dequantized(written, name, bits)), exact[name].float().numpy()
        error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
        assert found[name].relative == pytest.approx(error, rel=1e-3), name
    assert all(found[name].relative == 0 for name in written if name in exact and equal(written[name], exact[name]))


def test_layouts_do_not_matter(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = with_tokenizer(checkpoint("moe"), tmp_path / "one-tensor-an-expert")
    fused = with_tokenizer(checkpoint("moe", fused_experts=True), tmp_path / "fused")
    convert(source, tmp_path / "mlx", quantize=False, progress=False)
    for other in (fused, tmp_path / "mlx"):
        found = compare(source, other, text=TEXT[:60])
        assert found.worst() == ()
        assert found.mean_divergence < 1e-6


def test_tensors_that_only_one_has_are_named(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = with_tokenizer(checkpoint("dense", with_mtp=True), tmp_path / "source")
    bare = shutil.copytree(source, tmp_path / "bare")
    index = bare / "model.safetensors.index.json"
    kept = {name: shard for name, shard in json.loads(index.read_text())["weight_map"].items() if "mtp" not in name}
    index.write_text(json.dumps({"weight_map": kept}))
    (bare / "model-mtp.safetensors").unlink()
    found = compare(source, bare, text=TEXT[:60])
    assert found.only_b == ()
    assert len(found.only_a) == 15
    assert all(name.startswith("mtp.") for name in found.only_a)
    assert "15 tensors, such as mtp." in found.table()


FP8: dict[str, object] = {"quant_method": "fp8", "weight_block_size": None}
GPTQ: dict[str, object] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}


def whole_matrix_fp8(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """e4m3 with one scale, and what that stands for."""
    scale = (weight.abs().max() / 400).to(torch.bfloat16).reshape(1)
    codes = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * scale.float()).numpy()


def gptq_in_groups(weight: Tensor) -> tuple[dict[str, Tensor], Values]:
    """Symmetric 4-bit codes in groups of 32, and what they stand for."""
    groups = np.arange(weight.shape[1]) // 32
    found = nearest(weight, groups, bits=4, symmetric=True)
    return {
        "qweight": torch.from_numpy(little_endian(found.codes, 4).T.copy()),
        "qzeros": torch.from_numpy(little_endian(found.zeros.T - 1, 4)),
        "scales": found.scales.T,
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }, found.values


@pytest.mark.parametrize(("settings", "encode"), [(FP8, whole_matrix_fp8), (GPTQ, gptq_in_groups)], ids=["fp8", "gptq"])
def test_a_source_of_another_runtime_counts_by_the_values_that_it_stands_for(
    checkpoint: CheckpointFactory, tmp_path: Path, settings: dict[str, object], encode: Encoder
) -> None:
    foreign, plain = map(add_tokenizer, foreign_checkpoint(checkpoint("moe"), tmp_path, settings, encode))
    found = compare(plain, foreign, text=TEXT[:60])
    assert len(found.tensors) > 60
    assert max(tensor.relative for tensor in found.tensors) < 1e-6
    assert found.mean_divergence < 1e-5
    exact = with_tokenizer(checkpoint("moe"), tmp_path / "exact")
    assert compare(exact, foreign, text=TEXT[:60]).worst()[0].relative > 0.01


def test_json_holds_every_number(reference: Path, perturbed: Perturb) -> None:
    found = compare(reference, perturbed(reference, "lm_head.weight", 0.1), text=TEXT)
    written = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert written["perplexity"] == {"a": found.perplexity_a, "b": found.perplexity_b}
    assert written["kl_divergence_nats"] == {"mean": found.mean_divergence, "p99": found.p99_divergence}
    assert written["hidden_state_error_by_layer"] == list(found.layers)
    errors = {tensor["name"]: tensor["relative_error"] for tensor in written["tensors"]}
    assert errors == {tensor.name: tensor.relative for tensor in found.tensors}
