"""The MTP layer in torch, written from its published definition and independent of the MLX model.

The definition is vLLM's `qwen3_5_mtp.py`: the layer reads the state behind the model's final norm, and each later draft
what the layer gave, behind its own norm, at the draft before.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, THETA, EPS = 4, 2, 32, 8, 10000.0, 1e-6


# Which axis of M-RoPE (time, height, width) each rotated pair follows, for sections of 2, 1 and 1 pairs.
AXES = [0, 1, 2, 0]


def mtp_logits(
    weights: dict[str, Tensor], states: Tensor, embeddings: Tensor, head: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] from the states that the layer reads and the next tokens' embeddings, both [B, T, h].

    `weights` are the `mtp.*` tensors of a Hugging Face checkpoint, dense or with one tensor an expert. `positions` are
    int [3, T], those of text if None.
    """
    return mtp_states(weights, states, embeddings, positions) @ head.T


def mtp_states(
    weights: dict[str, Tensor], states: Tensor, embeddings: Tensor, positions: Tensor | None = None
) -> Tensor:
    """What the head reads, [B, T, h]; arguments as of `mtp_logits`."""
    if positions is None:
        positions = torch.arange(states.shape[1]).expand(3, -1)
    joined = torch.cat(
        [
            norm(embeddings, weights["mtp.pre_fc_norm_embedding.weight"]),
            norm(states, weights["mtp.pre_fc_norm_hidden.weight"]),
        ],
        dim=-1,
    )
    x = joined @ weights["mtp.fc.weight"].T
    layer = {name.removeprefix("mtp.layers.0."): tensor for name, tensor in weights.items()}
    x = x + _attention(norm(x, layer["input_layernorm.weight"]), layer, positions)
    normed = norm(x, layer["post_attention_layernorm.weight"])
    x = x + (_experts(normed, layer) if "mlp.gate.weight" in layer else _mlp(normed, layer, "mlp"))
    return norm(x, weights["mtp.norm.weight"])


def mtp_chain(
    weights: dict[str, Tensor], states: Tensor, embeddings: Tensor, head: Tensor, drafted: Tensor
) -> list[Tensor]:
    """Logits [B, V] of a chain of drafts that starts at the last of `states`, one a step.

    The first reads the model's states [B, T, h] and the next tokens' embeddings, of the whole text. Each further step
    reads what the step before gave, beside one of `drafted` [B, steps, h], embeddings of the drafts so far. As nothing
    is kept between steps, the keys and values of all of them are computed anew every time.
    """
    found = []
    for step in range(drafted.shape[1] + 1):
        given = mtp_states(weights, states, torch.cat([embeddings, drafted[:, :step]], dim=1))
        found.append(given[:, -1] @ head.T)
        states = torch.cat([states, given[:, -1:]], dim=1)
    return found


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Zero-centred root-mean-square norm."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight)


def _mlp(x: Tensor, layer: dict[str, Tensor], name: str) -> Tensor:
    gate, up, down = (layer[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def _experts(x: Tensor, layer: dict[str, Tensor]) -> Tensor:
    probabilities = (x @ layer["mlp.gate.weight"].T).softmax(-1)
    scores, chosen = probabilities.topk(3, dim=-1)
    weights = torch.zeros_like(probabilities).scatter(-1, chosen, scores / scores.sum(-1, keepdim=True))
    outputs = torch.stack([_mlp(x, layer, f"mlp.experts.{i}") for i in range(weights.shape[-1])], dim=-1)
    shared = torch.sigmoid(x @ layer["mlp.shared_expert_gate.weight"].T) * _mlp(x, layer, "mlp.shared_expert")
    return (outputs * weights.unsqueeze(-2)).sum(-1) + shared


def _attention(x: Tensor, layer: dict[str, Tensor], positions: Tensor) -> Tensor:
    B, T, _ = x.shape
    q, gate = (x @ layer["self_attn.q_proj.weight"].T).view(B, T, HEADS, 2, HEAD_DIM).unbind(3)
    k = (x @ layer["self_attn.k_proj.weight"].T).view(B, T, KV_HEADS, HEAD_DIM)
    v = (x @ layer["self_attn.v_proj.weight"].T).view(B, T, KV_HEADS, HEAD_DIM)
    q = _rotate(norm(q, layer["self_attn.q_norm.weight"]), positions)
    k = _rotate(norm(k, layer["self_attn.k_norm.weight"]), positions)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(later, -torch.inf).softmax(-1), v)
    return (out * torch.sigmoid(gate)).reshape(B, T, -1) @ layer["self_attn.o_proj.weight"].T


def _rotate(x: Tensor, positions: Tensor) -> Tensor:
    half = ROTARY_DIM // 2
    frequencies = THETA ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = positions[AXES].T[:, None].float() * frequencies
    first, second, rest = x.split([half, half, x.shape[-1] - ROTARY_DIM], dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
