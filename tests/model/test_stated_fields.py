"""Every field of transformers' configs is honoured as transformers does, or refused: none is passed over.

The tables name a value that differs from the usual one for each field; one that transformers adds makes a test fail.
"""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError, ConfigError
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Grid
from mlx_qwen.media.images import ImageProcessor
from mlx_qwen.media.videos import VideoProcessor
from mlx_qwen.prompt import Processor
from mlx_qwen.recommended import _NOT_FOLLOWED, passed_over
from tests.conftest import CheckpointFactory
from tests.support.checkpoints import Kind, randomize, reference_logits, reference_model
from tests.support.foreign import INPUT_IDS, logits

# Of training, of caches, of how transformers shows results, or of which tokens a caller stops at.
WITHOUT_EFFECT: dict[str, Any] = {
    **{"initializer_range": 0.5, "use_cache": False, "attention_dropout": 0.5, "output_router_logits": True},
    **{"router_aux_loss_coef": 0.5, "pad_token_id": 3, "bos_token_id": 4, "eos_token_id": 5},
}
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
TEXT: dict[str, Any] = {
    **WITHOUT_EFFECT,
    **{"vocab_size": 288, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_act": "gelu", "max_position_embeddings": 64},
    **{"rms_norm_eps": 0.3, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 16},
    **{"linear_conv_kernel_dim": 3, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"linear_num_key_heads": 1, "linear_num_value_heads": 2},
    "rope_parameters": ROPE,
    "layer_types": ["full_attention", "linear_attention"],
}
EXPERTS: dict[str, Any] = {
    **{"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts_per_tok": 1, "num_experts": 4},
}
NEXT: dict[str, Any] = {"decoder_sparse_step": 2, "norm_topk_prob": False, "mlp_only_layers": [1]}
CHANGES: dict[tuple[str, Kind], dict[str, Any]] = {
    ("Qwen3_5TextConfig", "dense"): {name: value for name, value in TEXT.items() if "router" not in name},
    ("Qwen3_5MoeTextConfig", "moe"): {k: v for k, v in {**TEXT, **EXPERTS}.items() if k != "intermediate_size"},
    ("Qwen3NextConfig", "next"): {**TEXT, **EXPERTS, **NEXT},
}
VISION: dict[str, Any] = {
    **{"depth": 1, "hidden_size": 16, "hidden_act": "relu", "intermediate_size": 48, "num_heads": 4},
    **{"in_channels": 1, "patch_size": 2, "spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": 32},
    **{"num_position_embeddings": 64, "initializer_range": 0.5},
    "rope_parameters": {"rope_type": "axial", "rope_theta": 30.0},
}
ON_TEXT = [(name, kind, field) for (name, kind), changed in CHANGES.items() for field in changed]


@pytest.mark.parametrize(("name", "kind"), CHANGES)
def test_every_field_of_the_text_models_has_its_turn(name: str, kind: Kind) -> None:
    assert set(inspect.get_annotations(getattr(transformers, name))) == set(CHANGES[name, kind])


@pytest.mark.parametrize(("name", "kind", "field"), ON_TEXT)
def test_a_field_of_the_text_model_is_honoured_or_refused(
    name: str, kind: Kind, field: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    usual = json.loads((checkpoint(kind, layers=2, interval=2) / "config.json").read_text())
    settings = {**usual, field: CHANGES[name, kind][field]}
    if field == "num_hidden_layers":
        del settings["layer_types"]
    config = getattr(transformers, name).from_dict(settings)
    model = getattr(transformers, settings["architectures"][0])(config)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "made")
    written = json.loads((tmp_path / "made" / "config.json").read_text())
    (tmp_path / "made" / "config.json").write_text(json.dumps({**written, field: settings.get(field, written[field])}))
    expected = reference_logits(tmp_path / "made", torch.tensor(INPUT_IDS)).numpy()
    try:
        found = logits(tmp_path / "made")
    except ConfigError as error:
        assert field in str(error)
        assert field in ("hidden_act",)
        return
    assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_every_field_of_the_vision_tower_has_its_turn() -> None:
    assert set(inspect.get_annotations(transformers.Qwen3_5VisionConfig)) == set(VISION)


@pytest.mark.parametrize("field", VISION)
def test_a_field_of_the_vision_tower_is_honoured_or_refused(
    field: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = checkpoint("dense_vl", layers=2, interval=2)
    settings = json.loads((source / "config.json").read_text())
    vision = {**settings["vision_config"], field: VISION[field]}
    if field == "out_hidden_size":
        settings["text_config"]["hidden_size"] = VISION[field]
    config = transformers.Qwen3_5Config.from_dict({**settings, "vision_config": vision})
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    randomize(model, 0)
    model.save_pretrained(tmp_path / "made")
    size = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    pixels = np.random.default_rng(0).standard_normal((24, size)).astype(np.float32)
    with torch.no_grad():
        tower = reference_model(tmp_path / "made").model.visual
        expected = tower(torch.from_numpy(pixels), torch.tensor([[1, 4, 6]])).pooler_output.numpy()
    try:
        ours = load_model(tmp_path / "made", ModelConfig.from_directory(tmp_path / "made")).vision
    except ConfigError as error:
        assert field in str(error)
        assert field == "hidden_act"
        return
    assert ours is not None
    found = np.array(ours(mx.array(pixels), [Grid(1, 4, 6)]))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    "kind", sorted({"linear", "dynamic", "longrope", "llama3", "yarn", "default", *ROPE_INIT_FUNCTIONS})
)
def test_every_way_to_scale_positions_is_honoured_or_refused(
    kind: str, checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    source = shutil.copytree(checkpoint("dense", layers=2, interval=2), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    scaled = {"factor": 4.0, "original_max_position_embeddings": 512} if kind != "default" else {}
    config["rope_parameters"] |= {"rope_type": kind, **scaled}
    (source / "config.json").write_text(json.dumps(config))
    if kind in ("default", "yarn"):
        expected = reference_logits(source, torch.tensor(INPUT_IDS)).numpy()
        assert np.abs(logits(source) - expected).max() <= 1e-3 * np.abs(expected).max()
        return
    with pytest.raises(ConfigError, match=f"rope_type is '{kind}'"):
        ModelConfig.from_directory(source)


@pytest.mark.parametrize(
    ("field", "usual", "other"),
    [
        ("do_resize", True, False),
        ("do_rescale", True, False),
        ("do_normalize", True, False),
        ("rescale_factor", 0.00392156862745098, 0.01),
        ("resample", 3, 2),
        ("patch_size", 4, 14),
        ("temporal_patch_size", 2, 1),
        ("merge_size", 2, 4),
        ("image_mean", [0.4, 0.5, 0.6], [0.5]),
        ("image_std", [0.4, 0.5, 0.6], [0.5, 0.5, 0]),
        ("size", {"shortest_edge": 4096, "longest_edge": 65536}, {"shortest_edge": "small"}),
        ("min_pixels", 4096, -1),
        ("max_pixels", 65536, [1]),
    ],
)
def test_a_field_of_the_preprocessors_is_honoured_or_refused(
    field: str, usual: object, other: object, checkpoint: CheckpointFactory
) -> None:
    vision = ModelConfig.from_directory(checkpoint("dense_vl")).vision
    assert vision is not None
    for kind, name in ((ImageProcessor, "preprocessor_config"), (VideoProcessor, "video_preprocessor_config")):
        kind.from_config(vision, {field: usual})
        with pytest.raises(CheckpointError, match=rf"^{name}\.json cannot be used"):
            kind.from_config(vision, {field: other})


# Those of sampling and stopping that answers follow, that name what is written, or are of transformers' own engine.
FOLLOWED = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "do_sample", "eos_token_id", "bos_token_id"),
    *("pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "max_time", "early_stopping"),
    *("num_return_sequences", "use_cache", "cache_implementation", "cache_config", "return_legacy_cache"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("prefill_chunk_size", "compile_config", "disable_compile", "low_memory", "is_assistant", "assistant_lookbehind"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "continuous_batching_config"),
    *("use_mtp", "max_cache_len", "assistant_ensemble_weight", "speculation_type", "transformers_version"),
}


def test_every_setting_of_generation_is_followed_or_named() -> None:
    known = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert known - FOLLOWED <= {*_NOT_FOLLOWED}
    usual = {name: value for name, value in vars(transformers.GenerationConfig()).items() if name in _NOT_FOLLOWED}
    assert passed_over(usual) == passed_over({}) == passed_over({"temperature": 0.7, "top_k": 20}) == []


@pytest.mark.parametrize(("name", "value"), [("no_repeat_ngram_size", 3), ("suppress_tokens", [7]), ("num_beams", 4)])
def test_a_setting_of_generation_that_is_not_followed_is_named(
    name: str, value: object, chat_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "folder")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, name: value}))
    with pytest.warns(UserWarning, match=f"generation_config.json of .* asks for {name}, which answers here"):
        Processor.from_directory(folder, ModelConfig.from_directory(folder))
