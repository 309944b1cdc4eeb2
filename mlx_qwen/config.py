"""Model configurations, read from the `config.json` of Hugging Face and MLX checkpoints.

Field names follow transformers' `Qwen3_5Config`, `Qwen3_5MoeConfig` and `Qwen3NextConfig`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from mlx_qwen.errors import ConfigError
from mlx_qwen.fields import Fields
from mlx_qwen.json_files import adapter_advice, read_json_object
from mlx_qwen.rope_config import RopeConfig, rope_config, vision_theta

Json = dict[str, Any]
LayerType = Literal["linear_attention", "full_attention"]

MODEL_TYPES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
# Two names of one function.
_VISION_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new")
_MOST_LAYERS, _MOST_EXPERTS, _MOST_SIDE = 10_000, 100_000, 1024
_MOE_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """The sparse experts of a decoder layer, beside one gated shared expert."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower: its sizes, and the base `theta` of its rotary embedding."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    num_position_embeddings: int
    out_hidden_size: int
    theta: float = 10000.0


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model. `sparse_layers[i]` tells whether decoder layer i has experts or a dense MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: tuple[LayerType, ...]
    sparse_layers: tuple[bool, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: bool
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe: MoEConfig | None
    mtp_num_hidden_layers: int
    eos_token_ids: tuple[int, ...]

    @property
    def linear_key_dim(self) -> int:
        """Width of all key heads of a Gated DeltaNet layer: Hk · Dk."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Width of all value heads of a Gated DeltaNet layer: Hv · Dv."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """Channels of the causal convolution: q, k and v side by side."""
        return 2 * self.linear_key_dim + self.linear_value_dim


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One checkpoint's configuration. `raw` is the file as read, for writing it back."""

    model_type: str
    text: TextConfig
    vision: VisionConfig | None
    image_token_id: int | None
    video_token_id: int | None
    quantization: Json | None
    eos_token_ids: tuple[int, ...]
    raw: Json

    @property
    def is_next(self) -> bool:
        """Whether projections are stored fused and interleaved, as Qwen3-Next stores them."""
        return self.model_type == "qwen3_next"

    @classmethod
    def from_directory(cls, path: Path) -> "ModelConfig":
        """Read `path/config.json`; raises ConfigError when it is absent, unreadable or impossible."""
        file = path / "config.json"
        if not file.is_file():
            gguf = any(path.glob("*.gguf")) * " Its GGUF files are llama.cpp's: use the repository they were made from."
            raise ConfigError(
                f"{path} has no config.json. Expected a model folder as Hugging Face or MLX tools write it.{gguf}"
                f"{adapter_advice(path)}"
            )
        return cls.from_dict(_with_modelopt(read_json_object(file, ConfigError), path / "hf_quant_config.json"))

    @classmethod
    def from_dict(cls, raw: Json) -> "ModelConfig":
        """Build from the parsed `config.json`; raises ConfigError on another family or an impossible value."""
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ConfigError(
                f"model_type is {model_type!r}, expected one of {', '.join(MODEL_TYPES)}. "
                "This package runs the Qwen3.5 family only; for other models use mlx-lm."
            )
        top = Fields(raw, "config.json")
        text = _text_config(top.object("text_config") if "text_config" in raw else top, raw, model_type)
        return cls(
            model_type=model_type,
            text=text,
            vision=_vision_config(top.object("vision_config")) if raw.get("vision_config") else None,
            image_token_id=raw.get("image_token_id"),
            video_token_id=raw.get("video_token_id"),
            quantization=raw.get("quantization"),
            eos_token_ids=tuple(dict.fromkeys(text.eos_token_ids + top.integers("eos_token_id"))),
            raw=raw,
        )


def _with_modelopt(raw: Json, file: Path) -> Json:
    """`raw` with the settings that ModelOpt may write into a file of its own, where it has none itself."""
    if raw.get("quantization_config") or raw.get("quantization") or not file.is_file():
        return raw
    settings = read_json_object(file, ConfigError).get("quantization")
    if not isinstance(settings, dict) or not settings.get("quant_algo"):
        return raw
    return {**raw, "quantization_config": {**settings, "quant_method": "modelopt"}}


def _text_config(fields: Fields, raw: Json, model_type: str) -> TextConfig:
    num_layers = fields.integer("num_hidden_layers", maximum=_MOST_LAYERS)
    moe = _moe_config(fields, is_next=model_type == "qwen3_next") if model_type in _MOE_TYPES else None
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    sparse = _sparse_layers(fields, num_layers, moe)
    head_dim = fields.integer("head_dim", hidden // heads)
    most_positions = fields.integer("max_position_embeddings", 262144)
    rope = rope_config(fields, head_dim, most_positions, has_axes=model_type != "qwen3_next")
    config = TextConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=0 if all(sparse) else fields.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        layer_types=_layer_types(fields, num_layers),
        sparse_layers=sparse,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        attention_bias=fields.flag("attention_bias", False),
        linear_num_key_heads=fields.integer("linear_num_key_heads"),
        linear_num_value_heads=fields.integer("linear_num_value_heads"),
        linear_key_head_dim=fields.integer("linear_key_head_dim"),
        linear_value_head_dim=fields.integer("linear_value_head_dim"),
        linear_conv_kernel_dim=fields.integer("linear_conv_kernel_dim", minimum=2),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=max(most_positions, rope.most_positions),
        tie_word_embeddings=Fields(raw, "config.json").flag(
            "tie_word_embeddings", fields.flag("tie_word_embeddings", False)
        ),
        moe=moe,
        mtp_num_hidden_layers=fields.integer("mtp_num_hidden_layers", 0, minimum=0),
        eos_token_ids=fields.integers("eos_token_id"),
    )
    _check_consistency(config, fields)
    return config


def _check_consistency(config: TextConfig, fields: Fields) -> None:
    place = fields.place
    if config.linear_num_value_heads % config.linear_num_key_heads:
        raise ConfigError(
            f"{place}.linear_num_value_heads is {config.linear_num_value_heads}, expected a multiple of "
            f"linear_num_key_heads ({config.linear_num_key_heads})."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise ConfigError(
            f"{place}.num_attention_heads is {config.num_attention_heads}, expected a multiple of "
            f"num_key_value_heads ({config.num_key_value_heads})."
        )
    if not fields.flag("attn_output_gate", True):
        raise ConfigError(f"{place}.attn_output_gate is false; every model of this family gates its attention output.")
    if fields.values.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{place}.hidden_act is {fields.values['hidden_act']!r}, expected 'silu'.")
    if fields.values.get("use_sliding_window"):
        raise ConfigError(f"{place}.use_sliding_window is true; full attention of this family has no window.")
    if config.mtp_num_hidden_layers > 1:
        raise ConfigError(f"{place}.mtp_num_hidden_layers is {config.mtp_num_hidden_layers}, expected 0 or 1.")


def _moe_config(fields: Fields, *, is_next: bool) -> MoEConfig:
    moe = MoEConfig(
        num_experts=fields.integer("num_experts", maximum=_MOST_EXPERTS),
        num_experts_per_tok=fields.integer("num_experts_per_tok"),
        moe_intermediate_size=fields.integer("moe_intermediate_size"),
        shared_expert_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        # Qwen3.5 always renormalises; Qwen3-Next says so in its config.
        norm_topk_prob=fields.flag("norm_topk_prob", True) if is_next else True,
    )
    if moe.num_experts_per_tok > moe.num_experts:
        raise ConfigError(
            f"{fields.place}.num_experts_per_tok is {moe.num_experts_per_tok}, "
            f"more than num_experts ({moe.num_experts})."
        )
    return moe


def _layer_types(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    types = fields.strings("layer_types")
    if not types:
        interval = fields.integer("full_attention_interval", 4)
        types = tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers))
    unknown = set(types) - {"linear_attention", "full_attention"}
    if unknown or len(types) != num_layers:
        raise ConfigError(
            f"{fields.place}.layer_types has {len(types)} entries of {sorted(set(types))}, expected {num_layers} "
            "of 'linear_attention' and 'full_attention'."
        )
    return cast(tuple[LayerType, ...], types)


def _sparse_layers(fields: Fields, num_layers: int, moe: MoEConfig | None) -> tuple[bool, ...]:
    dense = fields.integers("mlp_only_layers")
    step = fields.integer("decoder_sparse_step", 1)
    return tuple(moe is not None and i not in dense and (i + 1) % step == 0 for i in range(num_layers))


def _vision_config(fields: Fields) -> VisionConfig:
    if fields.values.get("deepstack_visual_indexes"):
        raise ConfigError("vision_config.deepstack_visual_indexes is not empty: that is Qwen3-VL, not Qwen3.5.")
    activation = fields.values.get("hidden_act", "gelu_pytorch_tanh")
    if activation not in _VISION_ACTIVATIONS:
        raise ConfigError(
            f"{fields.place}.hidden_act is {activation!r}, expected {' or '.join(map(repr, _VISION_ACTIVATIONS))}."
        )
    depth, heads = (
        next((fields.integer(name, maximum=_MOST_LAYERS) for name in names if name in fields.values), None)
        or fields.integer(names[0])
        for names in (("depth", "num_hidden_layers"), ("num_heads", "num_attention_heads"))
    )
    hidden = fields.integer("hidden_size")
    if hidden % heads:
        raise ConfigError(f"{fields.place}.hidden_size is {hidden}, expected a multiple of num_heads ({heads}).")
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_heads=heads,
        in_channels=fields.integer("in_channels", 3, maximum=_MOST_SIDE),
        patch_size=fields.integer("patch_size", 16, maximum=_MOST_SIDE),
        temporal_patch_size=fields.integer("temporal_patch_size", 2, maximum=_MOST_SIDE),
        spatial_merge_size=fields.integer("spatial_merge_size", 2, maximum=_MOST_SIDE),
        num_position_embeddings=fields.integer("num_position_embeddings", 2304),
        out_hidden_size=fields.integer("out_hidden_size"),
        theta=vision_theta(fields),
    )


def is_small(text: TextConfig) -> bool:
    """Whether the model has the shape of Qwen3.5-0.8B or -2B, which answer without thinking unless asked to."""
    return text.moe is None and text.hidden_size <= 2048 and text.num_hidden_layers == 24
