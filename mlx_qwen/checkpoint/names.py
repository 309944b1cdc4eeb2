"""The tensors of a checkpoint: names, shapes and roles, as they follow from a configuration.

Names and layouts are those of MLX checkpoints (mlx-lm and mlx-vlm read the same). The converter, the loader and every
size estimate work from this table; `mlx_qwen.checkpoint.layout` maps other layouts onto it.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from mlx_qwen.config import ModelConfig, TextConfig, VisionConfig

MTP_PREFIX = "mtp."
VISION_PREFIX = "vision_tower."
_DECODER_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\.")


class Role(Enum):
    """What a tensor is for; recipes and loaders decide by it how the tensor is stored."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    EXPERT = "expert"
    ROUTER = "router"
    GATE_INPUT = "gate_input"
    CONV = "conv"
    DECAY = "decay"
    SHIFTED_NORM = "shifted_norm"
    PLAIN_NORM = "plain_norm"
    BIAS = "bias"
    VISION = "vision"


# What stays in fp32 whatever the other weights become.
EXACT_ROLES = (Role.SHIFTED_NORM, Role.PLAIN_NORM, Role.DECAY)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor in MLX layout. SHIFTED_NORM weights are stored as the factor 1 + w."""

    name: str
    shape: tuple[int, ...]
    role: Role


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every tensor of the checkpoint that `config` describes, in reading order: text, MTP, vision."""
    specs = [*_text_specs(config)]
    if config.text.mtp_num_hidden_layers:
        specs += _mtp_specs(config.text)
    if config.vision is not None:
        specs += _vision_specs(config.vision)
    return specs


def decoder_layer(name: str) -> int | None:
    """The decoder layer that the tensor of this name belongs to, None for embeddings, head, MTP and vision."""
    found = _DECODER_LAYER.match(name)
    return None if found is None else int(found[1])


def text_prefix(config: ModelConfig) -> str:
    """Where MLX checkpoints of this model type keep the language model."""
    return "" if config.is_next else "language_model."


def _text_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    text, prefix = config.text, text_prefix(config)
    yield TensorSpec(f"{prefix}model.embed_tokens.weight", (text.vocab_size, text.hidden_size), Role.EMBEDDING)
    for i, kind in enumerate(text.layer_types):
        layer = f"{prefix}model.layers.{i}"
        if kind == "full_attention":
            yield from _attention_specs(text, f"{layer}.self_attn")
        else:
            yield from _gated_delta_specs(text, f"{layer}.linear_attn", fused=config.is_next)
        yield from _block_specs(text, layer, sparse=text.sparse_layers[i])
    yield TensorSpec(f"{prefix}model.norm.weight", (text.hidden_size,), Role.SHIFTED_NORM)
    if not text.tie_word_embeddings:
        yield TensorSpec(f"{prefix}lm_head.weight", (text.vocab_size, text.hidden_size), Role.HEAD)


def _mtp_specs(text: TextConfig) -> Iterator[TensorSpec]:
    hidden = text.hidden_size
    yield TensorSpec("mtp.pre_fc_norm_embedding.weight", (hidden,), Role.SHIFTED_NORM)
    yield TensorSpec("mtp.pre_fc_norm_hidden.weight", (hidden,), Role.SHIFTED_NORM)
    yield TensorSpec("mtp.fc.weight", (hidden, 2 * hidden), Role.LINEAR)
    yield from _attention_specs(text, "mtp.layers.0.self_attn")
    yield from _block_specs(text, "mtp.layers.0", sparse=text.moe is not None)
    yield TensorSpec("mtp.norm.weight", (hidden,), Role.SHIFTED_NORM)


def _block_specs(text: TextConfig, layer: str, *, sparse: bool) -> Iterator[TensorSpec]:
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{layer}.{norm}.weight", (text.hidden_size,), Role.SHIFTED_NORM)
    yield from (_moe_specs(text, f"{layer}.mlp") if sparse else _mlp_specs(text, f"{layer}.mlp"))


def _mlp_specs(text: TextConfig, mlp: str, width: int | None = None) -> Iterator[TensorSpec]:
    hidden, inner = text.hidden_size, width or text.intermediate_size
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield TensorSpec(f"{mlp}.{name}_proj.weight", shape, Role.LINEAR)


def _moe_specs(text: TextConfig, mlp: str) -> Iterator[TensorSpec]:
    moe = text.moe
    assert moe is not None, "only sparse layers have experts"
    hidden, experts, inner = text.hidden_size, moe.num_experts, moe.moe_intermediate_size
    yield TensorSpec(f"{mlp}.gate.weight", (experts, hidden), Role.ROUTER)
    for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
        yield TensorSpec(f"{mlp}.switch_mlp.{name}_proj.weight", (experts, rows, columns), Role.EXPERT)
    yield from _mlp_specs(text, f"{mlp}.shared_expert", moe.shared_expert_intermediate_size)
    yield TensorSpec(f"{mlp}.shared_expert_gate.weight", (1, hidden), Role.ROUTER)


def _attention_specs(text: TextConfig, attention: str) -> Iterator[TensorSpec]:
    q_width = text.num_attention_heads * text.head_dim
    kv_width = text.num_key_value_heads * text.head_dim
    shapes = {
        "q_proj": (2 * q_width, text.hidden_size),
        "k_proj": (kv_width, text.hidden_size),
        "v_proj": (kv_width, text.hidden_size),
        "o_proj": (text.hidden_size, q_width),
    }
    for name, shape in shapes.items():
        yield TensorSpec(f"{attention}.{name}.weight", shape, Role.LINEAR)
        if text.attention_bias:
            yield TensorSpec(f"{attention}.{name}.bias", shape[:1], Role.BIAS)
    for norm in ("q_norm", "k_norm"):
        yield TensorSpec(f"{attention}.{norm}.weight", (text.head_dim,), Role.SHIFTED_NORM)


def _gated_delta_specs(text: TextConfig, mixer: str, *, fused: bool) -> Iterator[TensorSpec]:
    hidden, heads, z_dim = text.hidden_size, text.linear_num_value_heads, text.linear_value_dim
    if fused:
        yield TensorSpec(f"{mixer}.in_proj_qkvz.weight", (text.linear_conv_dim + z_dim, hidden), Role.LINEAR)
        yield TensorSpec(f"{mixer}.in_proj_ba.weight", (2 * heads, hidden), Role.GATE_INPUT)
    else:
        yield TensorSpec(f"{mixer}.in_proj_qkv.weight", (text.linear_conv_dim, hidden), Role.LINEAR)
        yield TensorSpec(f"{mixer}.in_proj_z.weight", (z_dim, hidden), Role.LINEAR)
        yield TensorSpec(f"{mixer}.in_proj_b.weight", (heads, hidden), Role.GATE_INPUT)
        yield TensorSpec(f"{mixer}.in_proj_a.weight", (heads, hidden), Role.GATE_INPUT)
    yield TensorSpec(f"{mixer}.conv1d.weight", (text.linear_conv_dim, text.linear_conv_kernel_dim, 1), Role.CONV)
    yield TensorSpec(f"{mixer}.A_log", (heads,), Role.DECAY)
    yield TensorSpec(f"{mixer}.dt_bias", (heads,), Role.DECAY)
    yield TensorSpec(f"{mixer}.norm.weight", (text.linear_value_head_dim,), Role.PLAIN_NORM)
    yield TensorSpec(f"{mixer}.out_proj.weight", (hidden, z_dim), Role.LINEAR)


def _vision_specs(vision: VisionConfig) -> Iterator[TensorSpec]:
    width, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size, vision.in_channels)
    yield _vision("patch_embed.proj.weight", width, *patch)
    yield _vision("patch_embed.proj.bias", width)
    yield _vision("pos_embed.weight", vision.num_position_embeddings, width)
    for i in range(vision.depth):
        block = f"blocks.{i}"
        for norm in ("norm1", "norm2"):
            yield _vision(f"{block}.{norm}.weight", width)
            yield _vision(f"{block}.{norm}.bias", width)
        yield from _vision_linear(f"{block}.attn.qkv", 3 * width, width)
        yield from _vision_linear(f"{block}.attn.proj", width, width)
        yield from _vision_linear(f"{block}.mlp.linear_fc1", vision.intermediate_size, width)
        yield from _vision_linear(f"{block}.mlp.linear_fc2", width, vision.intermediate_size)
    yield _vision("merger.norm.weight", width)
    yield _vision("merger.norm.bias", width)
    yield from _vision_linear("merger.linear_fc1", merged, merged)
    yield from _vision_linear("merger.linear_fc2", vision.out_hidden_size, merged)


def _vision(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(f"{VISION_PREFIX}{name}", shape, Role.VISION)


def _vision_linear(name: str, rows: int, columns: int) -> Iterator[TensorSpec]:
    yield _vision(f"{name}.weight", rows, columns)
    yield _vision(f"{name}.bias", rows)


def parameter_count(specs: Iterable[TensorSpec]) -> int:
    """How many weights the given tensors hold."""
    return sum(prod(spec.shape) for spec in specs)
