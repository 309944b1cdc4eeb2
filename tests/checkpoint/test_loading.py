"""Loading is strict: every tensor is used, ignored by name, or named in one error that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_qwen import load
from mlx_qwen.checkpoint.layout import Layout, plan_checkpoint
from mlx_qwen.checkpoint.shards import INDEX_NAME, checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.support.checkpoints import KINDS, Kind, reference_logits

Checkpoint = Callable[..., Path]
Edit = Callable[[dict[str, mx.array]], None]


def loaded(path: Path, **options: object) -> Model:
    return load_model(path, ModelConfig.from_directory(path), **options)  # type: ignore[arg-type]


def edited(source: Path, target: Path, edit: Edit, **config: object) -> Path:
    """A copy of the single-file checkpoint `source` with its tensors changed by `edit`, and its config by `config`."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    edit(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, metadata={"format": "pt"})
    if config:
        raw = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**raw, **config}))
    return target


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(path)
    return str(caught.value)


def last_logits(model: Model) -> np.ndarray:
    return np.array(model(mx.array([[5, 9, 2, 77]]))[0, -1].astype(mx.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_tensor_is_used(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind)
    config = ModelConfig.from_directory(path)
    plan = plan_checkpoint(config, checkpoint_tensors(path))
    assert plan.layout is Layout.HUGGING_FACE
    assert plan.ignored == ()
    assert plan.has_vision == (kind in ("dense_vl", "moe_vl"))
    assert not plan.has_mtp


@pytest.mark.parametrize("kind", ["moe", "moe_vl"])
def test_fused_and_single_experts_load_alike(checkpoint: Checkpoint, kind: Kind) -> None:
    assert np.array_equal(
        last_logits(loaded(checkpoint(kind))), last_logits(loaded(checkpoint(kind, fused_experts=True)))
    )


def test_shards_load_as_one_file_does(checkpoint: Checkpoint) -> None:
    sharded = checkpoint("dense", shard_size="100KB")
    assert (sharded / INDEX_NAME).exists()
    assert np.array_equal(last_logits(loaded(sharded)), last_logits(loaded(checkpoint("dense"))))


def test_dtype_changes_weights_but_never_norms_and_gates(checkpoint: Checkpoint) -> None:
    for kind in ("dense", "moe"):
        kept = ("norm.weight", "layernorm.weight", "_norm_hidden.weight", "_norm_embedding.weight", "A_log", "dt_bias")
        for name, array in tree_flatten(loaded(checkpoint(kind, with_mtp=True), dtype=mx.bfloat16).parameters()):
            assert array.dtype == (mx.float32 if name.endswith(kept) else mx.bfloat16), name


def test_bf16_norms_become_exact_fp32_factors(checkpoint: Checkpoint) -> None:
    path = checkpoint("dense", dtype="bfloat16")
    stored = mx.load(str(path / "model.safetensors"))["model.layers.0.input_layernorm.weight"]
    assert mx.array_equal(loaded(path).layers[0].input_layernorm.weight, stored.astype(mx.float32) + 1)


def test_lazy_loading_gives_the_same_model(checkpoint: Checkpoint) -> None:
    assert np.array_equal(last_logits(loaded(checkpoint("dense"), lazy=True)), last_logits(loaded(checkpoint("dense"))))


def test_load_returns_a_model_and_a_processor(chat_folder: Path) -> None:
    model, processor = load(chat_folder)
    ids = processor.encode("what is the answer?")
    expected = reference_logits(chat_folder, torch.tensor([ids])).numpy()
    assert np.abs(np.array(model(mx.array([ids]))) - expected).max() <= 2e-4 * np.abs(expected).max()


def test_the_old_prefix_of_mlx_vlm_is_understood(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def rename(tensors: dict[str, mx.array]) -> None:
        for name in list(tensors):
            new = name.replace("model.", "language_model.model.", 1) if name.startswith("model.") else name
            tensors[new.replace("lm_head", "language_model.lm_head")] = tensors.pop(name)

    path = edited(checkpoint("dense"), tmp_path / "renamed", rename)
    assert np.array_equal(last_logits(loaded(path)), last_logits(loaded(checkpoint("dense"))))


def test_missing_tensors_are_grouped_and_explained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def drop(tensors: dict[str, mx.array]) -> None:
        for name in [name for name in tensors if name.endswith("mlp.up_proj.weight")]:
            del tensors[name]

    message = refusal(edited(checkpoint("dense"), tmp_path / "broken", drop))
    assert "4 tensors are missing" in message
    assert "layers.N.mlp.up_proj.weight (×4)" in message
    assert "Likely cause" in message


def test_unknown_tensors_are_grouped_and_explained(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def add(tensors: dict[str, mx.array]) -> None:
        tensors |= {f"model.layers.{i}.mlp.gate_proj.weight_scale_inv": mx.ones((1, 1)) for i in range(4)}

    message = refusal(edited(checkpoint("dense"), tmp_path / "broken", add))
    assert "weight_scale_inv (×4)" in message
    assert "quantized for another runtime" in message


def test_a_config_of_another_size_is_named_as_the_cause(checkpoint: Checkpoint, tmp_path: Path) -> None:
    message = refusal(edited(checkpoint("dense"), tmp_path / "broken", lambda _: None, intermediate_size=96))
    assert "[128, 64]" in message
    assert "[96, 64]" in message


def test_part_of_the_vision_tower_is_an_error_but_none_of_it_is_not(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def drop(tensors: dict[str, mx.array], most: int) -> None:
        for name in [name for name in tensors if ".visual." in name][:most]:
            del tensors[name]

    whole = checkpoint("dense_vl")
    without = edited(whole, tmp_path / "text", lambda tensors: drop(tensors, 1000))
    assert np.array_equal(last_logits(loaded(without)), last_logits(loaded(whole)))
    assert "missing" in refusal(edited(whole, tmp_path / "part", lambda tensors: drop(tensors, 3)))


@pytest.mark.parametrize(("change", "words"), [(1.0, "added twice"), (-1.0, "never added")])
def test_norms_shifted_twice_or_never_are_an_error(
    checkpoint: Checkpoint, tmp_path: Path, change: float, words: str
) -> None:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")

    def shift(tensors: dict[str, mx.array]) -> None:
        # As if a tool had already added 1, or had taken the factors for the stored weights.
        tensors |= {n: mx.abs(0.1 * x) * change + change for n, x in tensors.items() if n.endswith(names)}

    assert words in refusal(edited(checkpoint("dense"), tmp_path / "broken", shift))


def test_norms_that_are_not_finite_are_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def poison(tensors: dict[str, mx.array]) -> None:
        tensors["model.norm.weight"] = mx.full((64,), float("nan"))

    assert "NaN" in refusal(edited(checkpoint("dense"), tmp_path / "broken", poison))


def test_freshly_initialised_norms_are_accepted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def reset(tensors: dict[str, mx.array]) -> None:
        norms = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
        tensors |= {name: mx.zeros_like(x) for name, x in tensors.items() if name.endswith(norms)}

    assert np.isfinite(last_logits(loaded(edited(checkpoint("dense"), tmp_path / "fresh", reset)))).all()


def test_a_foreign_quantization_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = edited(checkpoint("dense"), tmp_path / "fp8", lambda _: None, quantization_config={"quant_method": "fp8"})
    assert "'fp8'" in refusal(path)


def test_a_newer_format_asks_for_an_upgrade(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = edited(checkpoint("dense"), tmp_path / "new", lambda _: None, mlx_qwen={"format": 99})
    assert "Upgrade" in refusal(path)


def test_one_odd_factor_does_not_hide_norms_shifted_twice(checkpoint: Checkpoint, tmp_path: Path) -> None:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")

    def shift(tensors: dict[str, mx.array]) -> None:
        tensors |= {n: mx.clip(x, -0.9, 0.9) + 1 for n, x in tensors.items() if n.endswith(names)}
        tensors["model.norm.weight"] = mx.where(mx.arange(64) == 3, -0.5, tensors["model.norm.weight"])

    assert "added twice" in refusal(edited(checkpoint("dense", layers=8), tmp_path / "broken", shift))


def test_a_config_that_promises_mlx_tensors_beside_others_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    marker = {"format": 1, "norms": "shifted", "companion": []}
    path = edited(checkpoint("dense"), tmp_path / "mixed", lambda _: None, mlx_qwen=marker)
    assert "different folders" in refusal(path)


def test_whole_numbers_in_the_place_of_weights_are_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def truncate(tensors: dict[str, mx.array]) -> None:
        name = "model.layers.0.linear_attn.out_proj.weight"
        tensors[name] = tensors[name].astype(mx.int32)

    message = refusal(edited(checkpoint("dense"), tmp_path / "broken", truncate))
    assert "out_proj.weight" in message
    assert "I32" in message


@pytest.mark.parametrize("module", ["layers.0.mlp.switch_mlp.down_proj", "layers.3.self_attn.q_proj"])
def test_packed_weights_without_their_biases_are_an_error(checkpoint: Checkpoint, tmp_path: Path, module: str) -> None:
    from mlx_qwen.convert import convert

    convert(checkpoint("moe"), tmp_path / "packed", group_size=32, progress=False)
    (tmp_path / "packed" / INDEX_NAME).unlink()

    def drop(tensors: dict[str, mx.array]) -> None:
        del tensors[f"language_model.model.{module}.biases"]

    assert f"{module}.biases" in refusal(edited(tmp_path / "packed", tmp_path / "broken", drop))
