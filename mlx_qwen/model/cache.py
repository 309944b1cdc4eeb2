"""A state that calls change in place, with the signature of mlx-lm's caches: `model(ids, cache)`."""

import mlx.core as mx

from mlx_qwen.config import TextConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.model.chain import Packing
from mlx_qwen.model.state import State, empty_state

KV_BITS = (4, 8)


class HybridCache:
    """Holds the `state` that the last call left; a call that fails or is interrupted leaves that of before.

    `tokens` are the ids that generation read and wrote, for penalties that reach back; those that the model was called
    with directly are unknown. `text` is the config of the model that it was made for, `identity` that model's own.
    """

    def __init__(self, state: State, text: TextConfig, identity: str = "") -> None:
        self.state = state
        self.text = text
        self.identity = identity
        self.tokens: list[int] = []

    @property
    def offset(self) -> int:
        """How many tokens it has seen, padding included."""
        return self.state.offset

    @property
    def rope_delta(self) -> mx.array | None:
        """int32 [B], how far the next token's position is ahead of `offset`; None before the first image."""
        return None if self.state.rope_delta is None else mx.array(self.state.rope_delta)

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold now."""
        return self.state.nbytes

    def arrays(self) -> list[mx.array]:
        """Every array, for `mx.eval`."""
        return self.state.arrays()


def kv_packing(text: TextConfig, kv_bits: int | None, kv_group_size: int | None = None) -> Packing | None:
    """How to pack keys and values to `kv_bits` 4 or 8, by default in groups of 64 channels where they divide a head.

    Raises:
        PromptError: `kv_bits` or `kv_group_size` cannot be used with this model's heads.
    """
    if kv_bits is None:
        return None
    if kv_bits not in KV_BITS:
        raise PromptError(f"kv_bits is {kv_bits}, expected 4, 8, or nothing for the model's own precision.")
    size = kv_group_size or (64 if text.head_dim % 64 == 0 else 32)
    if size not in (32, 64, 128) or text.head_dim % size:
        raise PromptError(
            f"kv_group_size is {size}, expected 32, 64 or 128 that divides the head size {text.head_dim}."
        )
    return Packing(kv_bits, size)


def make_cache(text: TextConfig, *, kv_bits: int | None = None, kv_group_size: int | None = None) -> HybridCache:
    """An empty cache; `kv_bits` 4 or 8 packs keys and values, not the linear layers' state. Raises as `kv_packing`."""
    return HybridCache(empty_state(text, kv_packing(text, kv_bits, kv_group_size)), text)
