"""Checkpoints as trainers, wrappers and other writers leave them load as what transformers makes of them."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlx_qwen.checkpoint.shards import INDEX_NAME
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.comparison import open_decoded
from mlx_qwen.errors import CheckpointError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import reference_logits

IDS = [[5, 117, 42, 42, 260, 9, 31, 208]]
Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Change = Callable[[dict[str, object]], None]


def variant(source: Path, target: Path, edit: Edit, change: Change = lambda config: None) -> Path:
    """A copy of a single-file checkpoint with other tensors, and another config."""
    shutil.copytree(source, target)
    save_file(edit(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def loaded(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def logits(path: Path) -> npt.NDArray[np.float32]:
    return np.array(loaded(path)(mx.array(IDS)).astype(mx.float32))


def assert_alike(actual: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def expected_logits(path: Path) -> npt.NDArray[np.float32]:
    return reference_logits(path, torch.tensor(IDS)).numpy()


def tied(top: bool | None, text: bool | None) -> Change:
    """The flag at the top, in `text_config`, in both or in neither."""

    def change(config: dict[str, object]) -> None:
        for place, flag in ((config, top), (config["text_config"], text)):
            assert isinstance(place, dict)
            place.pop("tie_word_embeddings", None)
            if flag is not None:
                place["tie_word_embeddings"] = flag

    return change


EMBEDDING = "model.language_model.embed_tokens.weight"
FLAGS = [(True, True), (True, None), (True, False), (None, True), (False, True)]


def with_head(tensors: dict[str, Tensor], *, equal: bool) -> dict[str, Tensor]:
    head = tensors[EMBEDDING].clone()
    return {**tensors, "lm_head.weight": head if equal else head.flip(0).contiguous()}


@pytest.mark.parametrize(("top", "text"), FLAGS)
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.filterwarnings("ignore:config.json says that the head is tied")
def test_a_head_of_its_own_counts_where_it_differs_from_the_embedding(
    equal: bool, top: bool | None, text: bool | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense_vl", tied=True)
    path = variant(source, tmp_path / "in", lambda tensors: with_head(tensors, equal=equal), tied(top, text))
    expected = expected_logits(path)
    model = loaded(path)
    assert (model.lm_head is None) == equal
    assert_alike(np.array(model(mx.array(IDS))), expected)
    convert(path, tmp_path / "out", quantize=False)
    assert_alike(logits(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is equal
    with open_decoded(path) as streamed:
        assert_alike(np.array(streamed.logits(_through(streamed))), expected)


def _through(model: object) -> object:
    state = model.embed(mx.array(IDS))  # type: ignore[attr-defined]
    for layer in model.layers():  # type: ignore[attr-defined]
        state = layer(state)
    return state


def test_a_head_of_its_own_is_spoken_of(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense_vl", tied=True)
    path = variant(source, tmp_path / "in", lambda tensors: with_head(tensors, equal=False))
    with pytest.warns(UserWarning, match="has a head of its own, which is used"):
        loaded(path)


@pytest.mark.parametrize(("top", "text"), FLAGS)
def test_the_only_copy_of_both_may_be_the_head(
    top: bool | None, text: bool | None, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense_vl", tied=True)

    def edit(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.replace(EMBEDDING, "lm_head.weight"): tensor for name, tensor in tensors.items()}

    path = variant(source, tmp_path / "in", edit, tied(top, text))
    assert_alike(logits(path), expected_logits(source))
    convert(path, tmp_path / "out", quantize=False)
    assert_alike(logits(tmp_path / "out"), expected_logits(source))


@pytest.mark.parametrize("without", ["lm_head.weight", EMBEDDING])
def test_where_nobody_ties_them_both_must_be_there(without: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    path = variant(
        checkpoint("dense_vl"), tmp_path / "in", lambda tensors: {k: v for k, v in tensors.items() if k != without}
    )
    with pytest.raises(CheckpointError, match="1 tensors are missing"):
        loaded(path)


def renamed(pattern: str, replacement: str) -> Edit:
    return lambda tensors: {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["dense", "moe_vl", "next"])
@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"^model\.(language_model\.)?(?!visual)", r"model.language_model.model."),
        (r"^model\.(language_model\.)?(?!visual)", r"model.model."),
        (r"^model\.(language_model\.)?(?!visual)", r""),
        (r"^", r"base_model.model."),
        (r"^", r"module."),
        (r"^", r"_orig_mod."),
        (r"^", r"module._orig_mod."),
        (r"(layers\.\d+)\.", r"\1._orig_mod."),
        (r"linear_attn\.A_log", r"linear_attn._fp32_params.A_log"),
    ],
)
def test_tensors_are_known_by_any_name_that_writers_give_them(
    pattern: str, replacement: str, kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint(kind)
    path = variant(source, tmp_path / "in", renamed(pattern, replacement))
    assert np.array_equal(logits(path), logits(source))
    assert load_model(path, ModelConfig.from_directory(path)).vision is not None or kind != "moe_vl"


def test_two_names_of_one_tensor_are_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    path = variant(
        source, tmp_path / "in", lambda tensors: {**tensors, "norm.weight": tensors["model.norm.weight"] + 1}
    )
    with pytest.raises(CheckpointError, match=r"are the same tensor, .*norm\.weight, under two names"):
        loaded(path)


USELESS = {
    "model.layers.3.self_attn.k_scale": torch.ones(1),
    "model.layers.3.self_attn.v_scale": torch.ones(1),
    "model.layers.3.self_attn.attn.q_scale": torch.ones(1),
    "model.layers.3.self_attn.kv_scale": torch.ones(1),
    "model.layers.3.self_attn.k_zero_point": torch.zeros(1),
    "model.layers.3.self_attn.k_proj.k_scale": torch.ones(1),
    "model.layers.3.self_attn.k_proj.output_scale": torch.ones(1),
    "model.layers.3.mlp.down_proj.input_scale": torch.ones(1),
    "model.layers.3.mlp.down_proj.bias": torch.zeros(64),
    "model.visual.patch_embed.proj.bias": torch.ones(32),
    "visual.rotary_pos_emb.inv_freq": torch.ones(8),
    "score.weight": torch.ones(2, 64),
    "v_head.summary.weight": torch.ones(1, 64),
}


def test_tensors_that_change_no_logit_are_named_once_and_left(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = checkpoint("dense")
    path = variant(source, tmp_path / "in", lambda tensors: {**tensors, **USELESS})
    for use in (lambda: logits(path), lambda: convert(path, tmp_path / "out", quantize=False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            use()  # type: ignore[no-untyped-call]
        (said,) = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
        assert said.startswith(f"{len(USELESS) - 1} tensors of the checkpoint") and "k_scale" in said
    assert np.array_equal(logits(path), logits(source))
    assert np.array_equal(logits(tmp_path / "out"), logits(source))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.3.mlp.down_proj.bias", torch.full((64,), 1e-3)),
        ("model.layers.3.mlp.down_proj.weight_scale", torch.ones(1)),
        ("model.layers.3.mlp.extra_proj.weight", torch.ones(64, 64)),
        ("model.layers.9.mlp.down_proj.weight", torch.ones(64, 128)),
    ],
)
def test_what_would_change_logits_is_refused_still(
    name: str, value: Tensor, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = variant(checkpoint("dense"), tmp_path / "in", lambda tensors: {**tensors, name: value})
    with pytest.raises(CheckpointError, match="1 tensors are not part of this model"):
        loaded(path)


def apart(source: Path, target: Path, file: str, *, indexed: bool, prefix: str = "mtp.") -> Path:
    """A copy whose MTP layer lies in `file`, outside the index, under names that begin with `prefix`."""
    shutil.copytree(source, target)
    tensors: dict[str, Tensor] = {}
    for shard in target.glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (target / INDEX_NAME).unlink(missing_ok=True)
    mtp = {name.replace("mtp.", prefix, 1): tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    main = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    stem = "model-00001-of-00001" if indexed else "model"
    save_file(main, target / f"{stem}.safetensors")
    save_file(mtp, target / file)
    if indexed:
        index = {"metadata": {}, "weight_map": dict.fromkeys(main, f"{stem}.safetensors")}
        (target / INDEX_NAME).write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("is_silent", [False, True])
@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp.", "model.language_model.mtp."])
@pytest.mark.parametrize(
    ("file", "indexed"), [("mtp.safetensors", True), ("mtp.safetensors", False), ("model-mtp.safetensors", True)]
)
def test_an_mtp_layer_is_found_wherever_it_lies(
    file: str, indexed: bool, prefix: str, is_silent: bool, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("moe", with_mtp=True)
    path = apart(source, tmp_path / "in", file, indexed=indexed, prefix=prefix)
    if is_silent:
        config = json.loads((path / "config.json").read_text())
        for place in (config, config.get("text_config", {})):
            place.pop("mtp_num_hidden_layers", None)
        (path / "config.json").write_text(json.dumps(config))
    expected, found = loaded(source).mtp, loaded(path).mtp
    assert expected is not None and found is not None
    assert mx.array_equal(found.fc.weight, expected.fc.weight)
    convert(path, tmp_path / "out")
    assert loaded(tmp_path / "out").mtp is not None


def test_an_mtp_layer_that_the_config_turns_off_is_left_and_named(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("dense", with_mtp=True), tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (config.get("text_config") or config)["mtp_num_hidden_layers"] = 0
    (source / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"15 tensors .* left out(?s:.*)mtp\."):
        assert loaded(source).mtp is None


def stale_beside(source: Path, target: Path, *, complete: bool) -> Path:
    """A folder of a single file, beside the index and shards of an older version."""
    shutil.copytree(source, target)
    old = {name: torch.zeros_like(tensor) for name, tensor in load_file(source / "model.safetensors").items()}
    shard = "model-00001-of-00001.safetensors"
    if complete:
        save_file(old, target / shard)
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(old, shard)}))
    os.utime(target / "model.safetensors")
    return target


def test_two_versions_of_the_weights_are_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    path = stale_beside(checkpoint("dense"), tmp_path / "in", complete=True)
    for use in (loaded, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match="remove the one that is old"):
            use(path)


def test_a_stale_index_beside_complete_weights_is_passed_over_as_transformers_does(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    path = stale_beside(checkpoint("dense"), tmp_path / "in", complete=False)
    with pytest.warns(UserWarning, match="It is old: model.safetensors is read"):
        actual = logits(path)
    assert_alike(actual, expected_logits(path))


def test_a_missing_shard_without_another_file_is_an_error_still(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    path = stale_beside(checkpoint("dense"), tmp_path / "in", complete=False)
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Download the missing files"):
        loaded(path)
