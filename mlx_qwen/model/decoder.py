"""One decoder layer: a token mixer and a feed-forward half, each behind a norm that adds the half before it."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.config import TextConfig
from mlx_qwen.model.attention import Attention
from mlx_qwen.model.gated_delta_net import GatedDeltaNet
from mlx_qwen.model.layers import RMSNorm
from mlx_qwen.model.mlp import MLP, SparseMoE
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import GatedDeltaCache, KVCache, LayerCache, QuantizedKVCache

_CACHE_ORDER = "a cache has one entry a layer, in the layers' order"


class Residual(NamedTuple):
    """The residual stream and the output of the last branch, which the next norm adds to it; both [B, T, hidden].

    The stream is fp32 from the first sum on.
    """

    stream: mx.array
    branch: mx.array | None = None

    def sum(self) -> mx.array:
        """The stream with every branch added."""
        return self.stream if self.branch is None else self.stream + self.branch

    def normed(self, norm: RMSNorm) -> tuple[mx.array, mx.array]:
        """The sum and its norm, in one launch."""
        return (self.stream, norm(self.stream)) if self.branch is None else norm.of_sum(self.stream, self.branch)


class Masks(NamedTuple):
    """Masks of a left-padded batch.

    `real` is bool [B, T], False where a new token is padding, or None when none is; `attention` is bool [B, 1, T, S].
    """

    real: mx.array | None
    attention: mx.array


class DecoderLayer(nn.Module):
    """Attention (`self_attn`) or Gated DeltaNet (`linear_attn`), then `mlp`."""

    def __init__(self, config: TextConfig, *, linear: bool, sparse: bool) -> None:
        super().__init__()
        self.is_linear = linear
        if linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        if sparse:
            assert config.moe is not None, "only configs with experts have sparse layers"
            self.mlp: MLP | SparseMoE = SparseMoE(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self, entering: Residual, positions: Positions, cache: LayerCache | None, masks: Masks | None
    ) -> Residual:
        """One layer on; `masks` where rows have left padding."""
        x, normed = entering.normed(self.input_layernorm)
        if self.is_linear:
            assert cache is None or isinstance(cache, GatedDeltaCache), _CACHE_ORDER
            mixed = self.linear_attn(normed, cache, masks and masks.real)
        else:
            assert cache is None or isinstance(cache, KVCache | QuantizedKVCache), _CACHE_ORDER
            mixed = self.self_attn(normed, positions, cache, masks and masks.attention)
        return self.feed_forward(Residual(x, mixed))

    def feed_forward(self, mixed: Residual) -> Residual:
        """The second half of the layer, behind its mixer."""
        x, normed = mixed.normed(self.post_attention_layernorm)
        return Residual(x, self.mlp(normed))
