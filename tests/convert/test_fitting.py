"""A size that is asked for is met from below, with bits where they avoid most harm."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.checkpoint.layout import Plan, Quantization, plan_checkpoint
from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert, describe
from mlx_qwen.convert.choices.sensitivity import harm_weights, measure, sampled_rows
from mlx_qwen.convert.recipes.kinds import joined_with
from mlx_qwen.errors import ConversionError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.conversions import HURT_LAYER, chosen, hurt_source, out_proj_bits
from tests.support.foreign import logits
from tools.benchmarks.synthetic import write_random_checkpoint

LADDER = [Quantization(bits, 64) for bits in (2, 3, 4, 5, 6, 8)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sparse and linear layers of a released shape, narrowed: enough matrices that a size can be met closely."""
    changes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    }
    folder = tmp_path_factory.mktemp("fitting") / "source"
    write_random_checkpoint(reduced("35B-A3B", num_layers=8, changes=changes), folder)
    return folder


def planned(folder: Path) -> Plan:
    return plan_checkpoint(ModelConfig.from_directory(folder), checkpoint_tensors(folder))


def weight_files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("share", [0.21, 0.25, 0.3, 0.37, 0.45, 0.6, 0.8])
def test_the_files_are_at_most_as_large_as_asked_for_and_little_smaller(
    share: float, source: Path, tmp_path: Path
) -> None:
    target = int(share * weight_files(source))
    convert(source, tmp_path / "out", target_size=target, quantizer="rtn")
    assert 0.98 * target <= weight_files(tmp_path / "out") <= target


def test_the_same_size_always_gives_the_same_bits(source: Path) -> None:
    assert describe(source, target_size="5MB") == describe(source, target_size="5MB")


def test_a_size_that_holds_everything_packs_nothing_but_routers(source: Path) -> None:
    packed = {name for name, kind in chosen(describe(source, target_size="10GB")).items() if kind is not None}
    assert packed == {name for name in packed if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))}


def test_the_report_names_only_precisions_that_something_has(
    source: Path, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    unpacked = convert(source, tmp_path / "none", target_size="10GB")
    assert "Precision        fitted: 8 bits, groups of 64; the rest bfloat16\n" in unpacked.table()
    assert json.loads((tmp_path / "none" / "config.json").read_text())["quantization"]["bits"] == 8
    small = convert(source, tmp_path / "small", target_size="5MB", dry_run=True)
    kinds = [row.quantization for row in small.description.rows if row.quantization is not None]
    shown = small.table().partition("fitted: ")[2].partition("; the rest")[0].split("; ")
    assert len(shown) == len(set(kinds)) > 1
    assert {part.removeprefix("mostly ").partition(" ")[0] for part in shown} == {str(kind.bits) for kind in kinds}


def test_a_size_at_which_nothing_is_packed_leaves_no_word_of_packing(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    report = convert(checkpoint("dense"), tmp_path / "out", target_size="10GB")
    assert report.quantization is None
    assert "Precision        float32\n" in report.table()
    assert "Nothing is packed" in report.description.table()
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "The weights are stored in float32." in (tmp_path / "out" / "README.md").read_text()


def test_a_size_that_cannot_be_met_is_refused_with_the_least_that_can(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="smallest possible is") as caught:
        describe(source, target_size="1MB")
    least = str(caught.value).partition("smallest possible is ")[2].partition(" MB")[0]
    convert(source, tmp_path / "out", target_size=f"{float(least) + 0.1}MB")
    assert {kind.bits for kind in chosen(describe(source, target_size=f"{float(least) + 0.1}MB")).values() if kind} >= {
        2
    }
    assert weight_files(tmp_path / "out") == pytest.approx(float(least) * 1e6, abs=0.15e6)


def test_matrices_that_the_loader_joins_stay_alike(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", target_size="5MB")
    groups: dict[str, set[Quantization | None]] = {}
    for name, kind in chosen(describe(source, target_size="5MB")).items():
        groups.setdefault(joined_with(name), set()).add(kind)
    assert all(len(kinds) == 1 for kinds in groups.values())
    model = load_model(tmp_path / "out", ModelConfig.from_directory(tmp_path / "out"))
    for layer in model.layers:
        joined = layer.linear_attn.in_proj_qkvz if layer.is_linear else layer.self_attn.qkv_proj
        assert len(joined.parts) == len(layer.mlp.shared_expert.gate_up_proj.parts) == 1


def test_projections_of_different_bits_still_load_and_agree(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("moe")
    convert(source, tmp_path / "plain", quantize=False)
    bits_for: dict[str, int | str] = {"k_proj": 4, "in_proj_z": "6,32", r"shared_expert\.up": 5}
    convert(source, tmp_path / "mixed", bits=8, bits_for=bits_for)
    expected, actual = logits(tmp_path / "plain"), logits(tmp_path / "mixed")
    assert np.abs(actual - expected).max() <= 0.2 * np.abs(expected).max()


def test_what_the_user_fixed_stays_and_the_rest_meets_the_size(source: Path, tmp_path: Path) -> None:
    options = {"target_size": "8MB", "bits_for": {"embed_tokens": "8,32", "o_proj": "none"}, "group_size": 32}
    convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    found = chosen(describe(source, **options))  # type: ignore[arg-type]
    assert found["language_model.model.embed_tokens.weight"] == Quantization(8, 32)
    assert found["language_model.model.layers.3.self_attn.o_proj.weight"] is None
    assert {kind.group_size for name, kind in found.items() if kind and "gate.weight" not in name} == {32}
    assert 0.98 * 8e6 <= weight_files(tmp_path / "out") <= 8e6


def test_bits_go_to_the_matrix_that_rounding_hurts_more(source: Path, tmp_path: Path) -> None:
    bits = out_proj_bits(describe(hurt_source(source, tmp_path / "source"), target_size="5MB"))
    assert bits[HURT_LAYER] > max(bits[i] for i in (0, 2, 4, 5, 6))


def test_harm_is_the_weighted_error_of_rounding(source: Path) -> None:
    target = next(t for t in planned(source).targets if t.spec.name.endswith("layers.0.linear_attn.out_proj.weight"))
    h = np.linspace(0.1, 3, target.spec.shape[-1], dtype=np.float32)
    (measured,) = measure([target], tuple(LADDER), importance={target.spec.name: mx.array(h)}, progress=False)
    rows = np.array(sampled_rows(target)).astype(np.float64)
    for kind in LADDER:
        groups = rows.reshape(len(rows), -1, 64)
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        step = np.maximum((high - low) / (2**kind.bits - 1), 1e-7)
        flat = np.broadcast_to(step, groups.shape).reshape(rows.shape)
        # Rounding errors are spread evenly over a step; MLX also brings zero onto the grid.
        even = (h * flat**2 / 12).sum() / (h * rows**2).sum()
        assert measured.harm[kind] == pytest.approx(harm_weights([target.spec])[target.spec.name] * even, rel=0.35)
    assert measured.harm[None] == 0


def test_rows_are_sampled_from_all_experts(checkpoint: CheckpointFactory) -> None:
    target = next(t for t in planned(checkpoint("moe")).targets if t.spec.name.endswith("switch_mlp.up_proj.weight"))
    rows = np.array(sampled_rows(target))
    experts = [np.array(source.matrix.read().astype(mx.float32)) for source in target.sources]
    found = {i for i, expert in enumerate(experts) for row in rows if (expert == row).all(axis=1).any()}
    assert found == set(range(8))


def test_a_size_that_is_none_is_told_every_unit(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"target_size is '16G', expected a positive number of bytes, or of kB"):
        convert(checkpoint("dense"), tmp_path / "out", target_size="16G")
