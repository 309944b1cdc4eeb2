"""Puts the tensors of a checkpoint into a model, joining projections that read the same input.

On disk every projection has its own matrix; in memory the rows of q, k, v and z, of gate and up, and so on stand in
one matrix where their precision allows it, so that a decoded token costs few launches. Packed rows are joined as they
are, without unpacking.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen.checkpoint.matrices import Matrix, Tensors
from mlx_qwen.checkpoint.names import VISION_PREFIX
from mlx_qwen.config import TextConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.model.attention import Attention
from mlx_qwen.model.collectives import SlicedEmbedding, SlicedHead
from mlx_qwen.model.decoder import DecoderLayer
from mlx_qwen.model.gated_delta_net import GatedDeltaNet
from mlx_qwen.model.layers import (
    AnyEmbedding,
    AnyExpertLinear,
    AnyLinear,
    ExpertLinear,
    FusedLinear,
    MicroscaledEmbedding,
    QuantizedExpertLinear,
)
from mlx_qwen.model.mlp import MLP, SparseMoE
from mlx_qwen.model.mtp import MTP
from mlx_qwen.model.qwen import Model
from mlx_qwen.model.rope import rotary_scale
from mlx_qwen.model.vision import LayerNorm, VisionTower

Holder = TypeVar("Holder", bound=nn.Module)

# What the factors of trained norms are like; the commonest silent damage is 1 added to them twice, or never.
_MOST_NEGATIVE = 0.1
_LEAST_FACTOR, _LEAST_MEAN = 1.0, 1.5
_OUTLIERS = 0.001


def assemble(model: Model, tensors: Tensors, *, interleaved: bool) -> None:
    """Give `model` its weights, by MLX name without the language-model prefix; arrays stay lazy.

    `interleaved` says that Gated DeltaNet projections come fused per key head, as Qwen3-Next stores them. Where several
    ranks share the model, the tensors are the parts that its `share` cuts; joined ones are let go before more is read.
    """
    share, text = model.share, model.share.text
    embedding = _embedding(tensors["model.embed_tokens"], tensors)
    has_head = model.lm_head is not None and (model.stages is None or model.stages.is_last)
    head = linear(tensors["lm_head"]) if has_head else None
    if model.group is None or share.count == 1 or model.stages is not None:
        model.embed_tokens, model.lm_head = embedding, head
    else:
        model.embed_tokens = SlicedEmbedding(embedding, share, model.group)
        model.lm_head = None if head is None else SlicedHead(head, model.group)
    model.norm.weight = tensors["model.norm"].weight
    for i, layer in enumerate(model.layers, start=0 if share.layers is None else share.layers[0]):
        fill_layer(layer, Below(tensors, f"model.layers.{i}."), text, interleaved)
    if model.mtp is not None:
        _fill_mtp(model.mtp, Below(tensors, "mtp."), model.config.text)
    fill_vision(model, tensors)


def fill_vision(model: Model, tensors: Tensors) -> None:
    """Give `model` the weights of its vision tower, if it has one."""
    if model.vision is not None:
        _fill_tower(model.vision, Below(tensors, VISION_PREFIX))


def linear(matrix: Matrix) -> AnyLinear:
    """A linear module that holds `matrix`."""
    quantization = matrix.quantization
    if quantization is None:
        module: AnyLinear = nn.Linear(1, 1, bias=False)
    else:
        bits, group_size, mode = quantization.bits, quantization.group_size, quantization.mode
        module = nn.QuantizedLinear(4 * group_size, 1, bias=False, group_size=group_size, bits=bits, mode=mode)
    return _hold(module, matrix)


def fused_linear(blocks: Iterable[Matrix]) -> FusedLinear:
    """Row blocks in order, neighbours of equal precision joined into one matrix."""
    groups: list[list[Matrix]] = []
    for block in blocks:
        if groups and groups[-1][0].quantization == block.quantization:
            groups[-1].append(block)
        else:
            groups.append([block])
    module = FusedLinear(1, [])
    module.parts = [linear(_joined(group)) for group in groups]
    return module


def _joined(matrices: list[Matrix]) -> Matrix:
    """Matrices of equal precision, their rows one below the other (for experts: in each expert)."""
    if len(matrices) == 1:
        return matrices[0]
    held = [matrix.arrays() for matrix in matrices]
    return matrices[0].with_arrays(
        {name: mx.concatenate([x[name] for x in held], axis=0 if name == "bias" else -2) for name in held[0]}
    )


def _activation_dtype(tensors: Tensors) -> mx.Dtype:
    """The dtype of what is never packed nor kept in fp32: the convolutions'; bf16 for a model without."""
    convolutions = (tensors[name].weight.dtype for name in tensors if name.endswith("linear_attn.conv1d"))
    return next(convolutions, mx.bfloat16)


def _embedding(matrix: Matrix, tensors: Tensors) -> AnyEmbedding:
    """The embedding; one that is packed without floats comes in the other `tensors`' dtype."""
    quantization = matrix.quantization
    if quantization is None:
        return _hold(nn.Embedding(1, 1), matrix)
    bits, group_size, mode = quantization.bits, quantization.group_size, quantization.mode
    if matrix.biases is None:
        return _hold(MicroscaledEmbedding(group_size, bits, mode, _activation_dtype(tensors)), matrix)
    return _hold(nn.QuantizedEmbedding(1, 4 * group_size, group_size=group_size, bits=bits, mode=mode), matrix)


def _hold(module: Holder, matrix: Matrix) -> Holder:
    """Give `module` the arrays of `matrix` under their own names."""
    if matrix.is_held:
        mx.eval(matrix.arrays())
    for name, array in matrix.arrays().items():
        module[name] = array
    return module


class Below(Mapping[str, Matrix]):
    """The tensors whose names begin with `prefix`, by the rest of their names; none is read before it is asked for."""

    def __init__(self, tensors: Tensors, prefix: str) -> None:
        self._tensors, self._prefix = tensors, prefix

    def __getitem__(self, name: str) -> Matrix:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def fill_layer(layer: DecoderLayer, tensors: Tensors, text: TextConfig, interleaved: bool) -> None:
    """Give one decoder layer its weights, by MLX name without the layer's prefix; see `assemble`."""
    layer.input_layernorm.weight = tensors["input_layernorm"].weight
    layer.post_attention_layernorm.weight = tensors["post_attention_layernorm"].weight
    if layer.is_linear:
        _fill_gated_delta(layer.linear_attn, Below(tensors, "linear_attn."), text, interleaved)
    else:
        _fill_attention(layer.self_attn, Below(tensors, "self_attn."), text)
    if isinstance(layer.mlp, SparseMoE):
        _fill_moe(layer.mlp, Below(tensors, "mlp."))
    else:
        _fill_mlp(layer.mlp, Below(tensors, "mlp."))


def _fill_gated_delta(mixer: GatedDeltaNet, tensors: Tensors, text: TextConfig, interleaved: bool) -> None:
    mixer.in_proj_qkvz = fused_linear(_inputs(tensors, "qkvz", text, interleaved))
    _hold(mixer.in_proj_ba, _unpacked_rows(_inputs(tensors, "ba", text, interleaved)))
    mixer.conv1d.weight = tensors["conv1d"].weight
    mixer.A_log, mixer.dt_bias = tensors["A_log"].weight, tensors["dt_bias"].weight
    mixer.norm.weight = tensors["norm"].weight
    mixer.out_proj = linear(tensors["out_proj"])


def _inputs(tensors: Tensors, kinds: Literal["qkvz", "ba"], text: TextConfig, interleaved: bool) -> list[Matrix]:
    """The rows of Gated DeltaNet's projections, kind by kind."""
    if not interleaved:
        return [tensors[f"in_proj_{name}"] for name in {"qkvz": ("qkv", "z"), "ba": ("b", "a")}[kinds]]
    # Qwen3-Next stores [q, k, v, z] (and [b, a]) of one key head after the other.
    per_key = text.linear_num_value_heads // text.linear_num_key_heads
    keys, values = text.linear_key_head_dim, per_key * text.linear_value_head_dim
    sizes = [keys, keys, values, values] if kinds == "qkvz" else [per_key] * 2
    return _deinterleaved(tensors[f"in_proj_{kinds}"], text.linear_num_key_heads, sizes)


def _unpacked_rows(matrices: list[Matrix]) -> Matrix:
    """The rows of `matrices`, dense: two a head are too few to be worth packing, and the gates are sensitive."""
    return Matrix(mx.concatenate([matrix.dense() for matrix in matrices]), is_held=matrices[0].is_held)


def _deinterleaved(matrix: Matrix, heads: int, sizes: list[int]) -> list[Matrix]:
    """Split rows stored as `sizes` rows of each kind a head into one matrix a kind."""
    kinds = []
    for i, size in enumerate(sizes):
        first = sum(sizes[:i])

        def pick(x: mx.array, first: int = first, size: int = size) -> mx.array:
            by_head = x.reshape(heads, sum(sizes), *x.shape[1:])
            return by_head[:, first : first + size].reshape(heads * size, *x.shape[1:])

        kinds.append(matrix.select(pick))
    return kinds


def _fill_attention(attention: Attention, tensors: Tensors, text: TextConfig) -> None:
    attention.qkv_proj = fused_linear(_queries_keys_values(tensors, text))
    attention.o_proj = linear(tensors["o_proj"])
    scale = rotary_scale(text.head_dim, text.rope)
    for name in ("q_norm", "k_norm"):
        weight = tensors[name].weight
        attention[name].weight = weight if scale is None else weight * scale


def _queries_keys_values(tensors: Tensors, text: TextConfig) -> list[Matrix]:
    q, gate = _deinterleaved(tensors["q_proj"], text.num_attention_heads, [text.head_dim] * 2)
    return [q, tensors["k_proj"], tensors["v_proj"], gate]


def _fill_mlp(mlp: MLP, tensors: Tensors) -> None:
    mlp.gate_up_proj = fused_linear([tensors["gate_proj"], tensors["up_proj"]])
    mlp.down_proj = linear(tensors["down_proj"])


def _fill_moe(moe: SparseMoE, tensors: Tensors) -> None:
    moe.router = fused_linear([tensors["gate"], tensors["shared_expert_gate"]])
    moe.switch_mlp.gate_up_proj = _experts(_gates_and_ups(tensors))
    moe.switch_mlp.down_proj = _experts(tensors["switch_mlp.down_proj"])
    _fill_mlp(moe.shared_expert, Below(tensors, "shared_expert."))


def _gates_and_ups(tensors: Tensors) -> Matrix:
    gate, up = tensors["switch_mlp.gate_proj"], tensors["switch_mlp.up_proj"]
    if gate.quantization != up.quantization:
        raise CheckpointError(
            f"The experts' gate_proj is stored as {gate.quantization} and up_proj as {up.quantization}, expected the "
            "same precision for both. Convert the model again."
        )
    return _joined([gate, up])


def _experts(matrix: Matrix) -> AnyExpertLinear:
    quantization = matrix.quantization
    if quantization is None:
        module: AnyExpertLinear = ExpertLinear(1, 1, 1)
    else:
        module = QuantizedExpertLinear(quantization.group_size, quantization.bits, quantization.mode)
    return _hold(module, matrix)


def _fill_mtp(mtp: MTP, tensors: Tensors, text: TextConfig) -> None:
    for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
        mtp[name].weight = tensors[name].weight
    mtp.fc = linear(tensors["fc"])
    fill_layer(mtp.layers[0], Below(tensors, "layers.0."), text, interleaved=False)


def _fill_tower(tower: VisionTower, tensors: Tensors) -> None:
    patches = tensors["patch_embed.proj"]
    # Pixels of a patch arrive channel by channel; the checkpoint keeps channels last.
    kernel = patches.weight.transpose(0, 4, 1, 2, 3)
    _hold(tower.patch_embed, replace(patches, weight=kernel.reshape(kernel.shape[0], -1)))
    tower.pos_embed = tensors["pos_embed"].dense()
    for i, block in enumerate(tower.blocks):
        parts = Below(tensors, f"blocks.{i}.")
        _fill_layer_norm(block.norm1, parts["norm1"])
        _fill_layer_norm(block.norm2, parts["norm2"])
        block.attn.qkv, block.attn.proj = linear(parts["attn.qkv"]), linear(parts["attn.proj"])
        block.mlp.linear_fc1, block.mlp.linear_fc2 = linear(parts["mlp.linear_fc1"]), linear(parts["mlp.linear_fc2"])
    merger = Below(tensors, "merger.")
    _fill_layer_norm(tower.merger.norm, merger["norm"])
    tower.merger.linear_fc1, tower.merger.linear_fc2 = linear(merger["linear_fc1"]), linear(merger["linear_fc2"])


def _fill_layer_norm(norm: LayerNorm, factor: Matrix) -> None:
    assert factor.bias is not None, "layer norms of the vision tower have a bias"
    norm.weight, norm.bias = factor.weight, factor.bias


def check_norms(model: Model) -> None:
    """Raise CheckpointError when the zero-centred norms look shifted twice or not at all.

    A trained factor 1 + w is positive nearly everywhere, and below 1 somewhere. Without the shift, many factors are
    negative or all are near 0; with two, hardly any is below 1 and their mean is above 1.5.
    """
    norms = [norm.weight for layer in model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    factors = np.array(mx.concatenate([*norms, model.norm.weight]))
    if not np.isfinite(factors).all():
        raise CheckpointError("Some RMSNorm weights are NaN or infinite. The checkpoint is damaged: download it again.")
    negative = float((factors < 0).mean())
    if negative > _MOST_NEGATIVE or np.abs(factors).mean() < _MOST_NEGATIVE:
        raise CheckpointError(
            f"{negative:.0%} of the RMSNorm factors are negative and their mean is {factors.mean():.2f}, expected "
            "positive ones around 1. The 1 of the factors 1 + w was never added: convert the model again."
        )
    least = float(np.quantile(factors, _OUTLIERS))
    if least >= _LEAST_FACTOR and factors.mean() >= _LEAST_MEAN:
        raise CheckpointError(
            f"Nearly all RMSNorm factors are at least {least:.2f} and their mean is {factors.mean():.2f}, expected "
            "around 1. The 1 of the factors 1 + w was added twice: convert the model again."
        )
