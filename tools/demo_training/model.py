"""The demo model: transformers' classes hold the weights, the fast layers compute, and an MTP layer joins them."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeDecoderLayer,
    Qwen3_5MoeGatedDeltaNet,
    Qwen3_5MoeRMSNorm,
)

from tools.demo_training.fast.functions import cross_entropy
from tools.demo_training.fast.layers import Rotary, add_norm, decoder_layer, linear
from tools.demo_training.fast.vision import image_features, pack

Tensor = torch.Tensor
MTP_WEIGHT = 0.3
BALANCE_WEIGHT = 0.002


@dataclass(frozen=True)
class Batch:
    """One batch as tensors.

    input_ids, labels: int64 [B, T], a label is the token at its own place or -100; position_ids: int64 [3, B, T];
    pixels: float32 [patches, 1536] or None; grids: height and width in patches of each image, in order of placeholders;
    weights: float32 [B, T], how much each label counts; only their proportions matter.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    pixels: Tensor | None
    grids: list[tuple[int, int]]
    weights: Tensor


@dataclass(frozen=True)
class Outcome:
    """loss: what to differentiate; token_loss, draft_loss: cross entropies in nats; right: bool [B, T], where the
    token at that place was predicted; drafted: the same of the MTP layer."""

    loss: Tensor
    token_loss: float
    draft_loss: float
    right: Tensor
    drafted: Tensor


class Mtp(nn.Module):
    """Multi-token prediction (DeepSeek-V3, 2024): from the state of token t and token t + 1 to token t + 2."""

    def __init__(self, text: Qwen3_5MoeTextConfig) -> None:
        super().__init__()
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(text.hidden_size, text.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(text.hidden_size, text.rms_norm_eps)
        self.fc = nn.Linear(2 * text.hidden_size, text.hidden_size, bias=False)
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(text, (text.layer_types or []).index("full_attention"))])
        self.norm = Qwen3_5MoeRMSNorm(text.hidden_size, text.rms_norm_eps)

    def join(self, normed: Tensor, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the layer, [B, T, hidden] in `dtype`: states behind the model's final norm or, of an earlier
        draft, this layer's own, beside the embeddings of the tokens that follow them."""
        _, token = add_norm(self.pre_fc_norm_embedding, embeddings, None, dtype)
        _, state = add_norm(self.pre_fc_norm_hidden, normed.float(), None, dtype)
        return linear(torch.cat([token, state], dim=-1), self.fc.weight)

    def forward(self, normed: Tensor, embeddings: Tensor, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Normed states [B, T, hidden] and router logits; arguments as of `join`."""
        layer = cast(Qwen3_5MoeDecoderLayer, self.layers[0])
        joined = self.join(normed, embeddings, dtype).float()
        residual, added, logits = decoder_layer(layer, joined, None, rotary, dtype)
        return add_norm(self.norm, residual, added, dtype)[1], logits


class DemoModel(nn.Module):
    """The whole model with its losses; `base` saves and loads as transformers does."""

    def __init__(self, config: Qwen3_5MoeConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = config
        self.text = cast(Qwen3_5MoeTextConfig, config.text_config)
        self.dtype = dtype
        self.base = Qwen3_5MoeForConditionalGeneration(config)
        self.mtp = Mtp(self.text)
        self.mtp.apply(self.base.model.language_model._init_weights)
        for module in self.modules():
            if isinstance(module, Qwen3_5MoeGatedDeltaNet):
                _start(module)

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings float32 [B, T, hidden], with the images' features at their placeholders."""
        embeddings = functional.embedding(batch.input_ids, self.base.model.language_model.embed_tokens.weight)
        if batch.pixels is None:
            return embeddings
        tower = self.base.model.visual
        packing = pack(batch.grids, tower.num_grid_per_side, tower.spatial_merge_size)
        features = image_features(tower, batch.pixels, packing, self.dtype)
        media = torch.tensor([self.config.image_token_id, self.config.video_token_id])
        return embeddings.masked_scatter(torch.isin(batch.input_ids, media)[..., None], features.float())

    def forward(self, batch: Batch) -> Outcome:
        """Losses of one batch: next tokens, the MTP layer's drafts, and how evenly the router used its experts."""
        embeddings = self.embed(batch)
        rotary = self.rotary(batch)
        normed, routers = self.decode(embeddings, rotary)
        drafts, router = self.mtp(normed, embeddings.roll(-1, 1), rotary, self.dtype)
        token_loss, right = self.cross_entropy(normed, batch, 1)
        draft_loss, drafted = self.cross_entropy(drafts, batch, 2)
        balance = torch.stack([self.imbalance(logits) for logits in (*routers, router)]).mean()
        loss = token_loss + MTP_WEIGHT * draft_loss + BALANCE_WEIGHT * balance
        return Outcome(loss, token_loss.item(), draft_loss.item(), right, drafted)

    def rotary(self, batch: Batch) -> Rotary:
        """M-RoPE's angles of the batch's positions."""
        cosine, sine = self.base.model.language_model.rotary_emb(torch.empty(0), batch.position_ids)
        return Rotary(cosine.contiguous(), sine.contiguous())

    def decode(self, embeddings: Tensor, rotary: Rotary) -> tuple[Tensor, list[Tensor]]:
        """States after the final norm, [B, T, hidden], and each layer's router logits."""
        text = self.base.model.language_model
        residual, added, routers = embeddings, None, []
        for layer in text.layers:
            residual, added, logits = decoder_layer(layer, residual, added, rotary, self.dtype)
            routers.append(logits)
        return add_norm(text.norm, residual, added, self.dtype)[1], routers

    def logits(self, normed: Tensor) -> Tensor:
        """[B, T, vocabulary] in the computing dtype, from normed states."""
        return linear(normed, self.base.model.language_model.embed_tokens.weight)

    def cross_entropy(self, normed: Tensor, batch: Batch, ahead: int) -> tuple[Tensor, Tensor]:
        """Mean loss of predicting the token `ahead` places later, and bool [B, T]: was the token here predicted."""
        targets = functional.pad(batch.labels[:, ahead:], (0, ahead), value=-100).flatten()
        weights = functional.pad(batch.weights[:, ahead:], (0, ahead)).flatten()
        share = weights / weights[targets >= 0].sum().clamp(min=1e-6)
        loss, right = cross_entropy(self.logits(normed).flatten(0, 1), targets, share)
        return loss, right.view(batch.labels.shape).roll(ahead, 1)

    def imbalance(self, logits: Tensor) -> Tensor:
        """1 when every expert gets an even share, more otherwise (Switch Transformer, Fedus et al., 2021)."""
        top_k = self.text.num_experts_per_tok
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, logits.topk(top_k).indices, 1.0)
        even: Tensor = (chosen.mean(0) * probabilities.mean(0)).sum() * (self.text.num_experts / top_k)
        return even


@torch.no_grad()
def _start(module: Qwen3_5MoeGatedDeltaNet) -> None:
    """Gives a layer's heads memories of ten to a thousand tokens, as Mamba-2 does, and its convolution full range."""
    step = torch.logspace(-3, -1, module.num_v_heads)
    module.dt_bias.copy_(torch.log(torch.expm1(step)))
    module.A_log.zero_()
    module.conv1d.weight.uniform_(-(module.conv_kernel_size**-0.5), module.conv_kernel_size**-0.5)
