"""Multi-token prediction: one more decoder layer that guesses the token after the next (DeepSeek-V3, 2024)."""

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.config import TextConfig
from mlx_qwen.model.decoder import DecoderLayer, Residual
from mlx_qwen.model.layers import AnyLinear, RMSNorm
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import KVCache


class MTP(nn.Module):
    """Joins the state of token t with the embedding of token t + 1; embeddings and head are the model's own."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.fc: AnyLinear = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = [DecoderLayer(config, linear=False, sparse=config.moe is not None)]
        self.norm = RMSNorm(hidden, eps)

    def __call__(
        self, hidden: mx.array, embeddings: mx.array, positions: Positions, cache: KVCache | None = None
    ) -> mx.array:
        """Hidden states for the head, [B, T, hidden].

        Args:
            hidden: fp32 [B, T, hidden], the model's states before its final norm.
            embeddings: [B, T, hidden] in the model's dtype, of the tokens that follow each of them.
            positions: of the tokens in `hidden`.
            cache: this layer's own keys and values.
        """
        normed_hidden = self.pre_fc_norm_hidden(hidden, embeddings.dtype)
        joined = mx.concatenate([self.pre_fc_norm_embedding(embeddings), normed_hidden], axis=-1)
        _, normed = self.layers[0](Residual(self.fc(joined)), positions, cache, None).normed(self.norm)
        return normed
