"""Multi-token prediction: one more decoder layer that guesses the token after the next (DeepSeek-V3, 2024).

It reads the state that the model's final norm gives, as the released heads expect it, and in a chain of drafts what it
gave itself at the step before: both have gone through a norm.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.config import TextConfig
from mlx_qwen.model.attention import KeyValues
from mlx_qwen.model.decoder import DecoderLayer, Residual
from mlx_qwen.model.layers import AnyLinear, RMSNorm
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import State


class Draft(NamedTuple):
    """One step of the MTP layer.

    Attributes:
        logits: [B, T, vocab_size] in the model's dtype, for the tokens after those that the step was given.
        normed: [B, T, hidden_size] in the model's dtype, the layer's output behind its norm: what the next step of the
            same chain reads in place of the model's state.
        memory: the layer's keys and values after the step.
    """

    logits: mx.array
    normed: mx.array
    memory: State


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
        self, states: mx.array, embeddings: mx.array, positions: Positions, memory: KeyValues | None = None
    ) -> mx.array:
        """What the head reads, and the next step of a chain: [B, T, hidden] in the embeddings' dtype.

        Args:
            states: [B, T, hidden] of any dtype, the model's states as this layer's checkpoint expects them, or what an
                earlier step returned.
            embeddings: [B, T, hidden] in the model's dtype, of the tokens that follow each of them.
            positions: of the tokens in `states`.
            memory: this layer's own keys and values, grown by T.
        """
        _, normed = self.layers[0](self.entering(states, embeddings), positions, memory).normed(self.norm)
        return normed

    def entering(self, states: mx.array, embeddings: mx.array) -> Residual:
        """What the decoder layer reads; arguments as of a call."""
        return Residual(self._joined(states, embeddings))

    def keys_and_values(self, states: mx.array, embeddings: mx.array, positions: Positions) -> mx.array:
        """The keys and values [2, B, Hkv, T, D] that a call would write, and nothing else; arguments as of a call."""
        layer = self.layers[0]
        return layer.self_attn.keys_and_values(layer.input_layernorm(self._joined(states, embeddings)), positions)

    def _joined(self, states: mx.array, embeddings: mx.array) -> mx.array:
        halves = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(states, embeddings.dtype)]
        joined: mx.array = self.fc(mx.concatenate(halves, axis=-1))
        return joined
