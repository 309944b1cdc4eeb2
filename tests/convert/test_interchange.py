"""What is converted here runs in mlx-lm and mlx-vlm, and what they convert runs here, with the same logits."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import KINDS
from tests.support.mlx_folders import main_arrays
from tests.support.tokenizers import add_tokenizer

mlx_lm = pytest.importorskip("mlx_lm")
mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
INPUT_IDS = mx.array([[5, 117, 42, 42, 260, 9, 31, 208, 77, 150, 3]])
TOLERANCE = 1e-3


def our_logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, ModelConfig.from_directory(folder))(INPUT_IDS).astype(mx.float32))


def mlx_lm_logits(folder: Path) -> np.ndarray:
    return np.array(mlx_lm_utils.load_model(folder)[0](INPUT_IDS).astype(mx.float32))


def mlx_vlm_logits(folder: Path) -> np.ndarray:
    mlx_vlm_utils = pytest.importorskip("mlx_vlm.utils")
    return np.array(mlx_vlm_utils.load_model(folder).language_model(INPUT_IDS).logits.astype(mx.float32))


def mlx_lm_convert(source: Path, target: Path, *, bits: int | None) -> None:
    furnished = add_tokenizer(shutil.copytree(source, target.with_name(f"{target.name}-source")))
    mlx_lm.convert(str(furnished), str(target), quantize=bits is not None, q_bits=bits, q_group_size=64)


def assert_same(actual: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("recipe", [None, "mixed-4-8"])
@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_gives_our_logits_for_what_we_convert(
    kind: str, recipe: str | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint(kind, with_mtp=True), tmp_path / "out", recipe=recipe, quantize=recipe is not None)
    assert_same(mlx_lm_logits(tmp_path / "out"), our_logits(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["dense", "next"])
def test_peers_learn_which_layers_are_full_attention(kind: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint(kind, layers=4, interval=2), tmp_path / "out", quantize=False)
    assert_same(mlx_lm_logits(tmp_path / "out"), our_logits(tmp_path / "out"))


def test_peers_learn_how_experts_are_weighed(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("next"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    del config["norm_topk_prob"]
    (source / "config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "out", quantize=False)
    assert_same(mlx_lm_logits(tmp_path / "out"), our_logits(tmp_path / "out"))


@pytest.mark.parametrize("recipe", [None, "mixed-4-8"])
@pytest.mark.parametrize("kind", ["dense", "moe", "dense_vl", "moe_vl"])
def test_mlx_vlm_gives_our_logits_for_what_we_convert(
    kind: str, recipe: str | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    convert(checkpoint(kind, with_mtp=True), tmp_path / "out", recipe=recipe, quantize=recipe is not None)
    assert_same(mlx_vlm_logits(tmp_path / "out"), our_logits(tmp_path / "out"))


def test_peers_read_any_mix_of_precisions_and_unpacked_matrices(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    bits_for: dict[str, int | str] = {"k_proj": 3, "in_proj_z": "6,32", "o_proj": "none", "switch_mlp": "5", "head": 8}
    convert(checkpoint("moe_vl"), tmp_path / "out", recipe="4bit", bits_for=bits_for)
    expected = our_logits(tmp_path / "out")
    assert_same(mlx_lm_logits(tmp_path / "out"), expected)
    assert_same(mlx_vlm_logits(tmp_path / "out"), expected)


def test_peers_read_what_was_fitted_to_a_size(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("moe_vl"), tmp_path / "out", target_size="700kB")
    expected = our_logits(tmp_path / "out")
    assert_same(mlx_lm_logits(tmp_path / "out"), expected)
    assert_same(mlx_vlm_logits(tmp_path / "out"), expected)


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mlx_lm_gives_our_logits_in_every_mode(mode: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("moe"), tmp_path / "out", mode=mode)
    # MLX unpacks embeddings of these modes to bf16, and each runtime rounds at its own places from there on.
    assert_same(mlx_lm_logits(tmp_path / "out"), our_logits(tmp_path / "out"), tolerance=0.05)


@pytest.fixture
def as_released(checkpoint: CheckpointFactory, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint in the form of the released ones, which mlx-lm expects.

    Qwen3.5 has fused experts and the dtype in `text_config`; Qwen3-Next has rotary fields outside `rope_parameters`.
    """

    def make(kind: str, **options: object) -> Path:
        released = shutil.copytree(checkpoint(kind, fused_experts=kind == "moe_vl", **options), tmp_path / "released")
        config = json.loads((released / "config.json").read_text())
        if kind == "next":
            rope = config.pop("rope_parameters")
            config |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
        else:
            config["text_config"]["dtype"] = config["dtype"]
        (released / "config.json").write_text(json.dumps(config))
        return released

    return make


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl", "next"])
def test_we_give_the_logits_of_mlx_lm_for_what_it_converts(
    kind: str, bits: int | None, as_released: Callable[..., Path], tmp_path: Path
) -> None:
    mlx_lm_convert(as_released(kind), tmp_path / "out", bits=bits)
    assert_same(our_logits(tmp_path / "out"), mlx_lm_logits(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_we_give_the_logits_of_mlx_vlm_for_what_it_converts(
    kind: str, as_released: Callable[..., Path], tmp_path: Path
) -> None:
    utils = pytest.importorskip("mlx_vlm.utils")
    quantization = pytest.importorskip("mlx_vlm.quant_utils")
    source, target = as_released(kind), tmp_path / "out"
    config = json.loads((source / "config.json").read_text())
    model, config = quantization.quantize_model(utils.load_model(source), config, 32, 8)
    utils.save_weights(target, model)
    utils.save_config(config, target / "config.json")
    assert_same(our_logits(target), mlx_vlm_logits(target))


def test_mlx_lm_packs_the_same_bits_where_both_round_to_nearest(
    as_released: Callable[..., Path], tmp_path: Path
) -> None:
    source = as_released("moe_vl", dtype="bfloat16")
    mlx_lm_convert(source, tmp_path / "theirs", bits=4)
    convert(source, tmp_path / "ours", bits=4, quantizer="rtn")
    theirs, ours = main_arrays(tmp_path / "theirs"), main_arrays(tmp_path / "ours")
    # They also pack the decay inputs and leave vision out.
    shared = {name for name in ours if not any(part in name for part in ("in_proj_a", "in_proj_b", "vision_tower"))}
    assert shared <= theirs.keys()
    assert [name for name in shared if not mx.array_equal(theirs[name], ours[name])] == []


def test_a_folder_of_mlx_lm_converted_again_keeps_its_packed_weights(
    as_released: Callable[..., Path], tmp_path: Path
) -> None:
    mlx_lm_convert(as_released("moe_vl"), tmp_path / "theirs", bits=4)
    convert(tmp_path / "theirs", tmp_path / "ours", bits=4)
    theirs, ours = main_arrays(tmp_path / "theirs"), main_arrays(tmp_path / "ours")
    packed = [name for name, array in ours.items() if array.dtype == mx.uint32]
    assert len(packed) > 10
    assert [name for name in packed if not mx.array_equal(theirs[name], ours[name])] == []
    assert_same(mlx_lm_logits(tmp_path / "ours"), our_logits(tmp_path / "ours"))
