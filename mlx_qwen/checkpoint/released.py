"""The released sizes of Qwen3.5, as configurations: for estimates and benchmarks that need no download."""

from dataclasses import dataclass
from typing import Any

from mlx_qwen.config import Json, ModelConfig
from mlx_qwen.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Vision:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class _Experts:
    num: int
    per_token: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class _Size:
    hidden_size: int
    num_layers: int
    query_heads: int
    kv_heads: int
    value_heads: int
    tied: bool
    intermediate_size: int | None = None
    experts: _Experts | None = None
    vision: _Vision = _Vision(27, 1152, 4304, 16)


_SMALL_VISION, _MEDIUM_VISION = _Vision(12, 768, 3072, 12), _Vision(24, 1024, 4096, 16)
_SIZES = {
    "0.8B": _Size(1024, 24, 8, 2, 16, tied=True, intermediate_size=3584, vision=_SMALL_VISION),
    "2B": _Size(2048, 24, 8, 2, 16, tied=True, intermediate_size=6144, vision=_MEDIUM_VISION),
    "4B": _Size(2560, 32, 16, 4, 32, tied=True, intermediate_size=9216, vision=_MEDIUM_VISION),
    "9B": _Size(4096, 32, 16, 4, 32, tied=False, intermediate_size=12288),
    "27B": _Size(5120, 64, 24, 4, 48, tied=False, intermediate_size=17408),
    "35B-A3B": _Size(2048, 40, 16, 2, 32, tied=False, experts=_Experts(256, 8, 512)),
    "122B-A10B": _Size(3072, 48, 32, 2, 64, tied=False, experts=_Experts(256, 8, 1024)),
    "397B-A17B": _Size(4096, 60, 32, 2, 64, tied=False, experts=_Experts(512, 10, 1024)),
}
SIZES = tuple(_SIZES)


def released(name: str, *, num_layers: int | None = None) -> ModelConfig:
    """The configuration of a released size such as "0.8B" or "35B-A3B", or of its first `num_layers` layers.

    Raises ConfigError for a name that is not in `SIZES`.
    """
    if name not in _SIZES:
        raise ConfigError(f"{name!r} is no released size, expected one of {', '.join(SIZES)}.")
    size = _SIZES[name]
    model_type = "qwen3_5" if size.experts is None else "qwen3_5_moe"
    architecture = "Qwen3_5" if size.experts is None else "Qwen3_5Moe"
    return ModelConfig.from_dict(
        {
            "architectures": [f"{architecture}ForConditionalGeneration"],
            "model_type": model_type,
            "image_token_id": 248056,
            "video_token_id": 248057,
            "vision_start_token_id": 248053,
            "vision_end_token_id": 248054,
            "tie_word_embeddings": size.tied,
            "text_config": _text(size, f"{model_type}_text", num_layers or size.num_layers),
            "vision_config": _vision(size, model_type),
        }
    )


def _text(size: _Size, model_type: str, num_layers: int) -> dict[str, Any]:
    fields = {
        "model_type": model_type,
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": size.hidden_size,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(num_layers)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": size.value_heads,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": size.query_heads,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10_000_000,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": size.tied,
        "vocab_size": 248320,
    }
    if size.experts is None:
        return {**fields, "intermediate_size": size.intermediate_size}
    experts = {
        "num_experts": size.experts.num,
        "num_experts_per_tok": size.experts.per_token,
        "moe_intermediate_size": size.experts.intermediate_size,
        "shared_expert_intermediate_size": size.experts.intermediate_size,
    }
    return {**fields, **experts}


def _vision(size: _Size, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "deepstack_visual_indexes": [],
        "depth": size.vision.depth,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": size.vision.hidden_size,
        "in_channels": 3,
        "intermediate_size": size.vision.intermediate_size,
        "num_heads": size.vision.num_heads,
        "num_position_embeddings": 2304,
        "out_hidden_size": size.hidden_size,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def reduced(name: str, *, num_layers: int, changes: Json) -> ModelConfig:
    """A released size cut down to a text model of `num_layers` layers, with `changes` to its text fields; no MTP."""
    raw = released(name, num_layers=num_layers).raw
    text = {**raw["text_config"], "mtp_num_hidden_layers": 0, **changes}
    tied = changes.get("tie_word_embeddings", raw["tie_word_embeddings"])
    return ModelConfig.from_dict({"model_type": raw["model_type"], "text_config": text, "tie_word_embeddings": tied})
