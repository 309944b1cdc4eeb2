"""Transformers' Qwen3.5-MoE layers, computed by this folder's kernels with the weights that the modules hold.

Every function takes the transformers module first. Rows are in the dtype to compute in (float32 or bfloat16), the
residual stream and all parameters in float32; a sequence is padded on the right, so no mask is needed.
"""

from typing import NamedTuple

import torch
from torch.nn import functional
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeAttention,
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeGatedDeltaNet,
    Qwen3_5MoeRMSNorm,
    Qwen3_5MoeSparseMoeBlock,
)

from tools.demo_training.fast import functions

Tensor = torch.Tensor


class Rotary(NamedTuple):
    """cosine and sine of the positions, float32 [B, T, rotary dims]."""

    cosine: Tensor
    sine: Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times weight [out, in], in the dtype of x."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def add_norm(
    norm: Qwen3_5MoeRMSNorm, residual: Tensor, delta: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """residual + delta, float32 [B, T, hidden], and its norm in `dtype`."""
    return functions.add_norm(residual, delta, norm.weight, norm.eps, dtype)


def gated_delta_net(module: Qwen3_5MoeGatedDeltaNet, x: Tensor) -> Tensor:
    """x [B, T, hidden] through one Gated DeltaNet layer; all four input projections are one product."""
    projections = (module.in_proj_qkv, module.in_proj_z, module.in_proj_b, module.in_proj_a)
    rows = linear(x, torch.cat([projection.weight for projection in projections]))
    taps = module.conv1d.weight[:, 0].T.contiguous()
    weights = (taps, module.A_log, module.dt_bias, module.norm.weight)
    out = functions.gated_delta(rows, module.num_k_heads, module.num_v_heads, weights)
    return linear(out, module.out_proj.weight)


def attention(module: Qwen3_5MoeAttention, x: Tensor, rotary: Rotary) -> Tensor:
    """x [B, T, hidden] through one causal gated attention layer."""
    B, T, _ = x.shape
    query_and_gate = linear(x, module.q_proj.weight).view(B, T, -1, 2 * module.head_dim)
    key = linear(x, module.k_proj.weight).view(B, T, -1, module.head_dim)
    value = linear(x, module.v_proj.weight).view(B, T, -1, module.head_dim).transpose(1, 2).contiguous()
    query = functions.turn(query_and_gate, module.q_norm.weight, *rotary, module.q_norm.eps)
    key = functions.turn(key, module.k_norm.weight, *rotary, module.k_norm.eps)
    out = functions.causal_attention(query, key, value, module.scaling)
    gated = out.transpose(1, 2) * torch.sigmoid(query_and_gate[..., module.head_dim :])
    return linear(gated.reshape(B, T, -1), module.o_proj.weight)


def sparse_moe(module: Qwen3_5MoeSparseMoeBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, T, hidden] through routed and shared experts, and the router's logits [B * T, experts].

    All experts are computed as one product each way; those that a token did not choose are multiplied by zero.
    """
    rows = x.view(-1, x.shape[-1])
    experts, shared = module.experts, module.shared_expert
    logits = linear(rows, torch.cat([module.gate.weight, module.shared_expert_gate.weight]))
    up = torch.cat([experts.gate_up_proj.flatten(0, 1), shared.gate_proj.weight, shared.up_proj.weight])
    down = torch.cat([experts.down_proj.transpose(0, 1).flatten(1), shared.down_proj.weight], dim=1)
    active = functions.activate(linear(rows, up), logits, module.gate.top_k)
    return linear(active, down).view(x.shape), logits[:, :-1]


def decoder_layer(
    layer: Qwen3_5MoeDecoderLayer, residual: Tensor, delta: Tensor | None, rotary: Rotary, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer on residual + delta: the residual [B, T, hidden] and what the experts add to it, then router logits.

    The sum of the two is left to the next norm, which reads both anyway.
    """
    residual, x = add_norm(layer.input_layernorm, residual, delta, dtype)
    linear_attention = layer.block_type == "linear_attention"
    mixed = gated_delta_net(layer.linear_attn, x) if linear_attention else attention(layer.self_attn, x, rotary)
    residual, x = add_norm(layer.post_attention_layernorm, residual, mixed, dtype)
    added, logits = sparse_moe(layer.mlp, x)
    return residual, added, logits
