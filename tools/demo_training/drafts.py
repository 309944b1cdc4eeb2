"""What the MTP layer learns: drafts one after the other, each step fed with what the layer gave at the one before.

The model under it is frozen: it gives the states that the first step reads, and the distributions that all steps are
to give. Chains start at all tokens of the answers at once, as in EAGLE-3's training (Li et al., 2025).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch.nn import functional
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeAttention, Qwen3_5MoeDecoderLayer

from tools.demo_training.fast import functions
from tools.demo_training.fast.layers import Rotary, add_norm, linear, sparse_moe
from tools.demo_training.model import BALANCE_WEIGHT, Batch, DemoModel, Mtp

Tensor = torch.Tensor
DEPTH = 4
# A later draft counts only where all before it were taken.
FALLING = 0.85


@dataclass(frozen=True)
class Outcome:
    """loss: what to differentiate; right: by depth, the share of answers' tokens where the draft is the token that the
    model finds likeliest."""

    loss: Tensor
    right: list[float]


@dataclass(frozen=True)
class Taught:
    """What the frozen model says of a batch: embeddings, states after the final norm and logits, [B, T, ...]."""

    embeddings: Tensor
    normed: Tensor
    logits: Tensor
    rotary: Rotary


@torch.no_grad()
def taught(model: DemoModel, batch: Batch) -> Taught:
    """Run the model itself on a batch."""
    embeddings, rotary = model.embed(batch), model.rotary(batch)
    normed, _ = model.decode(embeddings, rotary)
    return Taught(embeddings, normed, model.logits(normed), rotary)


def drafting_loss(model: DemoModel, batch: Batch, depth: int = DEPTH) -> Outcome:
    """Cross entropy between the model's distributions and those of `depth` drafts in a row."""
    known = taught(model, batch)
    places = starts(batch.labels, depth)
    loss, right, routers = torch.zeros(()), [], []
    for step, (normed, router) in enumerate(drafted(model.mtp, known, places, depth, model.dtype)):
        part, share = _distance(model, batch, known.logits, normed, places, step)
        loss = loss + FALLING**step * part
        right.append(share)
        routers.append(router)
    balance = torch.stack([model.imbalance(router) for router in routers]).mean()
    return Outcome(loss + BALANCE_WEIGHT * balance, right)


def starts(labels: Tensor, depth: int) -> Tensor:
    """int64 [B, M], the tokens of each row of labels [B, T] whose chains reach one that is learnt; where others have
    more, a row's last token again, whose chain reaches nothing."""
    T = labels.shape[1]
    learnt = functional.pad(labels >= 0, (0, depth + 1))
    wanted = torch.stack([learnt[:, step + 2 :][:, :T] for step in range(depth)]).any(0)
    rows = [row.nonzero()[:, 0] for row in wanted]
    most = max(len(row) for row in rows)
    return torch.stack([functional.pad(row, (0, most - len(row)), value=T - 1) for row in rows])


def drafted(mtp: Mtp, known: Taught, places: Tensor, depth: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The layer's normed states [B, M, hidden] and router logits at each of `depth` steps.

    Step i of the chain that token t starts reads token t + i + 1 at the position of t + i. Its keys are those of all
    first steps up to t, made from the model's own states, and those of its own chain since.
    """
    layer = cast(Qwen3_5MoeDecoderLayer, mtp.layers[0])
    first = mtp.join(known.normed, known.embeddings.roll(-1, 1), dtype).float()
    _, x = add_norm(layer.input_layernorm, first, None, dtype)
    attention = _ChainedAttention(layer.self_attn, places, *_keys_and_values(layer.self_attn, x, known.rotary))
    normed = _at(known.normed, places)
    for step in range(depth):
        rotary = Rotary(*(_at(part, places + step) for part in known.rotary))
        residual = mtp.join(normed, _at(known.embeddings, places + step + 1), dtype).float()
        residual, x = add_norm(layer.input_layernorm, residual, None, dtype)
        residual, x = add_norm(layer.post_attention_layernorm, residual, attention(x, rotary, later=step > 0), dtype)
        added, router = sparse_moe(layer.mlp, x)
        normed = add_norm(mtp.norm, residual, added, dtype)[1]
        yield normed, router


class _ChainedAttention:
    """Gated attention of chains to the first steps up to their start, and to the later steps of their own."""

    def __init__(self, module: Qwen3_5MoeAttention, places: Tensor, keys: Tensor, values: Tensor) -> None:
        self.module, self.keys, self.values = module, keys, values
        self.hidden = (torch.arange(keys.shape[2]) > places[..., None])[:, None, None]
        self.own: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, rotary: Rotary, *, later: bool) -> Tensor:
        """x [B, M, hidden] to the same shape; keys and values of `later` steps are kept for those that follow."""
        module, (B, M, _) = self.module, x.shape
        query_and_gate = linear(x, module.q_proj.weight).view(B, M, -1, 2 * module.head_dim)
        query = functions.turn(query_and_gate, module.q_norm.weight, *rotary, module.q_norm.eps)
        if later:
            self.own.append(_keys_and_values(module, x, rotary))
        out = self._attended(query).transpose(1, 2) * torch.sigmoid(query_and_gate[..., module.head_dim :])
        return linear(out.reshape(B, M, -1), module.o_proj.weight)

    def _attended(self, query: Tensor) -> Tensor:
        """[B, H, M, D]; query heads that share a key head are rows of one product with it."""
        B, _, M, D = query.shape
        grouped = query.view(B, self.keys.shape[1], -1, M, D) * self.module.scaling
        shared = (grouped.flatten(2, 3) @ self.keys.mT).view(*grouped.shape[:4], -1)
        scores = [shared.masked_fill(self.hidden, -torch.inf)]
        scores += [(grouped * key[:, :, None]).sum(-1, keepdim=True) for key, _ in self.own]
        weights = torch.cat(scores, dim=-1).float().softmax(-1).to(query.dtype)
        T = self.keys.shape[2]
        out = (weights[..., :T].flatten(2, 3) @ self.values).view(grouped.shape)
        for place, (_, value) in enumerate(self.own, start=T):
            out = out + weights[..., place, None] * value[:, :, None]
        return out.view(query.shape)


def _keys_and_values(module: Qwen3_5MoeAttention, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Both [B, Hkv, T, D], of x [B, T, hidden]."""
    shape = (*x.shape[:2], -1, module.head_dim)
    key = functions.turn(linear(x, module.k_proj.weight).view(shape), module.k_norm.weight, *rotary, module.k_norm.eps)
    return key, linear(x, module.v_proj.weight).view(shape).transpose(1, 2)


def _distance(
    model: DemoModel, batch: Batch, logits: Tensor, normed: Tensor, places: Tensor, step: int
) -> tuple[Tensor, float]:
    """Mean cross entropy of one step's drafts, weighted by answer, and how many of them are the likeliest token."""
    reached = places + step + 2
    inside = reached < batch.labels.shape[1]
    learnt = inside & (_at(batch.labels[..., None], reached)[..., 0] >= 0)
    expected = _at(logits, reached - 1)[learnt].float()
    weights = _at(batch.weights[..., None], reached)[learnt][..., 0]
    drafts = model.logits(normed[learnt]).float()
    losses = -(expected.softmax(-1) * functional.log_softmax(drafts, -1)).sum(-1)
    right = (drafts.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return (losses * weights).sum() / weights.sum(), right


def _at(x: Tensor, places: Tensor) -> Tensor:
    """The rows of x [B, T, n] at int64 [B, M], or the last one where there are no more: [B, M, n]."""
    inside = places.clamp(max=x.shape[1] - 1)
    return x.gather(1, inside[..., None].expand(-1, -1, x.shape[-1]))
