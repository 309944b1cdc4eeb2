"""What a hybrid model remembers between calls: keys and values that grow, or a state that does not."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import mlx.core as mx

from metal_kernels.gated_delta import MixerResult, Tape, roll_back
from mlx_qwen.config import TextConfig
from mlx_qwen.errors import PromptError

KV_BITS = (4, 8)
RECORDED_TOKENS = 8
_STEP = 256


class Quantized(NamedTuple):
    """Rows packed by `mx.quantize` along their last axis."""

    packed: mx.array
    scales: mx.array
    biases: mx.array


class KVCache:
    """Keys and values of one attention layer, [2, B, Hkv, S, D], in a buffer that grows by steps of 256 tokens.

    They share it, so that one launch appends to both.
    """

    def __init__(self) -> None:
        self.offset = 0
        self._kv: mx.array | None = None

    def update(self, kv: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [2, B, Hkv, T, D]; returns all keys and all values, [B, Hkv, offset, D]."""
        self._kv = _appended(self._kv, kv, self.offset)
        self.offset += kv.shape[3]
        return keys_and_values(self._kv[..., : self.offset, :])

    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.offset -= tokens

    def arrays(self) -> list[mx.array]:
        """The buffer, for `mx.eval`."""
        return [] if self._kv is None else [self._kv]


class QuantizedKVCache:
    """As KVCache, with every group of `group_size` channels packed to `bits` bits."""

    def __init__(self, bits: int, group_size: int) -> None:
        self.offset = 0
        self.bits = bits
        self.group_size = group_size
        self._kv: Quantized | None = None

    def update(self, kv: mx.array) -> tuple[Quantized, Quantized]:
        """Pack and append keys and values [2, B, Hkv, T, D]; returns all keys and all values, packed."""
        parts = Quantized(*mx.quantize(kv, group_size=self.group_size, bits=self.bits))
        before: Sequence[mx.array | None] = self._kv or (None, None, None)
        self._kv = Quantized(*(_appended(old, new, self.offset) for old, new in zip(before, parts, strict=True)))
        self.offset += kv.shape[3]
        keys, values = zip(*(keys_and_values(part[..., : self.offset, :]) for part in self._kv), strict=True)
        return Quantized(*keys), Quantized(*values)

    def trim(self, tokens: int) -> None:
        """Forget the last `tokens` tokens."""
        self.offset -= tokens

    def arrays(self) -> list[mx.array]:
        """The buffers, for `mx.eval`."""
        return [*(self._kv or ())]


@dataclass(slots=True)
class GatedDeltaCache:
    """The fixed-size memory of one Gated DeltaNet layer.

    `conv_state` is the last W - 1 rows that went into the convolution, [B, W - 1, C]; `state` the fp32 memory
    [B, Hv, Dv, Dk]. Both are None before the first token. While `recording`, a call of up to `RECORDED_TOKENS` tokens
    leaves a tape for `roll_back`.
    """

    conv_state: mx.array | None = None
    state: mx.array | None = None
    recording: bool = False
    _before: tuple[mx.array | None, mx.array | None] = (None, None)
    _tape: Tape | None = None

    def advance(self, mixed: MixerResult) -> None:
        """Take the states that a call left; those of before are kept as long as its tape."""
        self._tape = mixed.tape
        self._before = (None, None) if mixed.tape is None else (self.conv_state, self.state)
        self.conv_state, self.state = mixed.conv_state, mixed.state

    def roll_back(self, kept: int) -> None:
        """Keep only the first `kept` tokens of the last call, which must have been recorded.

        Raises:
            ValueError: it was not: recording was off, it had too many tokens, or it was the first call of all.
        """
        conv_state, state = self._before
        if self._tape is None or conv_state is None or state is None:
            raise ValueError(
                f"roll_back needs a recorded call: record() first, then at most {RECORDED_TOKENS} tokens after a prompt"
            )
        self.conv_state, self.state = roll_back(self._tape, kept, conv_state, state)

    def arrays(self) -> list[mx.array]:
        """The held arrays, for `mx.eval`."""
        return [] if self.conv_state is None or self.state is None else [self.conv_state, self.state]


LayerCache = KVCache | QuantizedKVCache | GatedDeltaCache


class HybridCache(list[LayerCache]):
    """One entry a decoder layer, as mlx-lm's caches are lists, and what belongs to the whole sequence.

    `offset` counts the tokens seen, padding included; `padding` is how many of them were left padding in each row
    [B], or None when no row had any. `rope_delta` int32 [B] is how far the next token's position is ahead of `offset`,
    or None before the first image: an image takes fewer positions than tokens. `tokens` are the ids that generation
    read and wrote, for penalties that reach back; see `mlx_qwen.engine.caching`.
    """

    def __init__(self, layers: Sequence[LayerCache]) -> None:
        super().__init__(layers)
        self.offset = 0
        self.padding: mx.array | None = None
        self.rope_delta: mx.array | None = None
        self.tokens: list[int] = []

    def next_position(self) -> mx.array:
        """The position of the next token: int [], or [B] once there were images."""
        offset = mx.array(self.offset)
        return offset if self.rope_delta is None else offset + self.rope_delta

    @property
    def kv_layers(self) -> list[int]:
        """Indices of the attention layers, whose memory grows with the context."""
        return [i for i, layer in enumerate(self) if not isinstance(layer, GatedDeltaCache)]

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays hold now."""
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        """Every array of every layer, for `mx.eval`."""
        return [array for layer in self for array in layer.arrays()]

    @property
    def recording(self) -> bool:
        """Whether calls leave what `roll_back` needs."""
        return any(isinstance(layer, GatedDeltaCache) and layer.recording for layer in self)

    def record(self, on: bool = True) -> None:
        """From now on, let every call of up to `RECORDED_TOKENS` leave what `roll_back` needs, or no longer."""
        for layer in self:
            if isinstance(layer, GatedDeltaCache):
                layer.recording = on

    def roll_back(self, kept: int, tokens: int) -> None:
        """Forget all but the first `kept` of the `tokens` tokens of the last call, which was recorded.

        Keys and values are cut off; the linear layers' states are replayed from the call's tape. Once only a call.
        """
        if kept == tokens:
            return
        for layer in self:
            if isinstance(layer, GatedDeltaCache):
                layer.roll_back(kept)
            else:
                layer.trim(tokens - kept)
        self.offset -= tokens - kept

    def note_padding(self, mask: mx.array) -> None:
        """Remember how many tokens of `mask` [B, T] (False = padding) were left padding."""
        padding = (~mask).sum(axis=-1)
        self.padding = padding if self.padding is None else self.padding + padding


def make_cache(text: TextConfig, *, kv_bits: int | None = None, kv_group_size: int = 64) -> HybridCache:
    """An empty cache for the given model; `kv_bits` 4 or 8 packs keys and values, not the linear layers' state.

    Raises:
        PromptError: `kv_bits` or `kv_group_size` cannot be used with this model's heads.
    """
    if kv_bits is not None:
        if kv_bits not in KV_BITS:
            raise PromptError(f"kv_bits is {kv_bits}, expected 4, 8, or nothing for the model's own precision.")
        if kv_group_size not in (32, 64, 128) or text.head_dim % kv_group_size:
            raise PromptError(
                f"kv_group_size is {kv_group_size}, expected 32, 64 or 128 that divides the head size {text.head_dim}."
            )

    def layer(kind: str) -> LayerCache:
        if kind == "linear_attention":
            return GatedDeltaCache()
        return KVCache() if kv_bits is None else QuantizedKVCache(kv_bits, kv_group_size)

    return HybridCache([layer(kind) for kind in text.layer_types])


def cache_nbytes(text: TextConfig, tokens: int, *, item_size: int = 2) -> int:
    """Bytes of an unquantized cache after `tokens` tokens of one sequence; `item_size` is that of keys and values."""
    attention = sum(kind == "full_attention" for kind in text.layer_types)
    linear = text.num_hidden_layers - attention
    kv = 2 * text.num_key_value_heads * text.head_dim * item_size * tokens
    state = 4 * prod((text.linear_num_value_heads, text.linear_value_head_dim, text.linear_key_head_dim))
    conv = item_size * (text.linear_conv_kernel_dim - 1) * text.linear_conv_dim
    return attention * kv + linear * (state + conv)


def keys_and_values(kv: mx.array) -> tuple[mx.array, mx.array]:
    """The halves of [2, ...], as views."""
    keys, values = mx.split(kv, 2)
    return keys.squeeze(0), values.squeeze(0)


def _appended(held: mx.array | None, new: mx.array, offset: int) -> mx.array:
    """`new` [..., T, D] written behind the first `offset` tokens of `held`, in a larger buffer when it is full."""
    *outer, T, D = new.shape
    capacity = 0 if held is None else held.shape[-2]
    if offset + T > capacity:
        room = mx.zeros((*outer, -(-(offset + T) // _STEP) * _STEP - offset, D), dtype=new.dtype)
        held = room if held is None else mx.concatenate([held[..., :offset, :], room], axis=-2)
    assert held is not None, "a buffer exists once there is room"
    held[..., offset : offset + T, :] = new
    return held
