"""Bytes that a running model needs beside its weights, for one sequence."""

from dataclasses import dataclass
from math import prod

from mlx_qwen.config import TextConfig
from mlx_qwen.model.memory import KV_GROUP_SIZE, growth_bytes, held_kv_bytes, kv_bytes, prefill_bytes, score_bytes
from mlx_qwen.model.state import state_nbytes

__all__ = [
    "KV_GROUP_SIZE",
    "Needs",
    "growth_bytes",
    "held_kv_bytes",
    "kv_bytes",
    "prefill_bytes",
    "recurrent_bytes",
    "score_bytes",
    "state_bytes",
]

_FP32 = 4


def recurrent_bytes(text: TextConfig) -> int:
    """The fp32 states of all Gated DeltaNet layers, which do not grow."""
    heads = (text.linear_num_value_heads, text.linear_value_head_dim, text.linear_key_head_dim)
    return text.layer_types.count("linear_attention") * _FP32 * prod(heads)


def state_bytes(text: TextConfig) -> int:
    """All that the Gated DeltaNet layers keep: their fp32 states and the last rows of their convolutions."""
    return state_nbytes(text, 0)


@dataclass(frozen=True, slots=True)
class Needs:
    """What one sequence takes beside the weights, in bytes, when its prompt is read `step` tokens at once."""

    text: TextConfig
    step: int
    kv_bits: int | None
    item_size: int = 2

    def activations(self, tokens: int) -> int:
        """An estimate of the arrays alive while the last piece of `tokens` is read, or keys and values grow there."""
        growth = growth_bytes(self.text, tokens, kv_bits=self.kv_bits, item_size=self.item_size)
        return max(self._piece(tokens), growth)

    def beside_weights(self, tokens: int) -> int:
        """Keys, values, state and activations at the end of `tokens` tokens."""
        return self._held(tokens) + self.activations(tokens)

    def reading(self, tokens: int) -> int:
        """As `beside_weights`, while a prompt of `tokens` is read from its first token on: its room is made at once."""
        return self._held(tokens) + self._piece(tokens)

    def _held(self, tokens: int) -> int:
        kv = held_kv_bytes(self.text, tokens, kv_bits=self.kv_bits, item_size=self.item_size)
        return kv + state_nbytes(self.text, 0, item_size=self.item_size)

    def _piece(self, tokens: int) -> int:
        step = min(tokens, self.step)
        return prefill_bytes(self.text, step, tokens, kv_bits=self.kv_bits, item_size=self.item_size)
