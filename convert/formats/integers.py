"""Integer codes with a scale and a zero a group, as GPTQ, AWQ and compressed-tensors store them in their own ways.

A value is scale · (code − zero). MLX's affine form, scale · code + bias, holds the same grid with bias = −scale · zero,
so codes of a fitting layout move over as they are.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import gcd

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.errors import CheckpointError

_MLX_GROUPS = (128, 64, 32)
_MLX_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class IntegerMatrix(ABC):
    """Codes [N, K] of `bits` bits; columns share a scale and a zero with the `group_size` − 1 others of their group.

    `order` [K] gives the group of each column where they are not consecutive (GPTQ's act-order).
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    parts: tuple[TensorInfo, ...]
    order: TensorInfo | None

    @abstractmethod
    def words(self, start: int, stop: int) -> mx.array:
        """Codes of rows start:stop as uint32 [rows, K · bits / 32], the first code in the lowest bits."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> mx.array:
        """Scales of rows start:stop, float32 [rows, K / group_size]."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> mx.array:
        """Codes that stand for 0 in rows start:stop, float32 [rows, K / group_size]."""

    @property
    def affine(self) -> Quantization | None:
        """How MLX would hold the same codes, None if it cannot; long groups become several with the same scale."""
        K = self.shape[1]
        whole = min(self.group_size, K)
        group_size = next((size for size in _MLX_GROUPS if whole % size == 0 and K % size == 0), None)
        if group_size is None or self.order is not None or self.bits not in _MLX_BITS:
            return None
        return Quantization(self.bits, group_size)

    def values(self, start: int, stop: int) -> mx.array:
        """Rows start:stop in fp32, in which codes times fp16 or bf16 scales are exact."""
        codes = unpack(self.words(start, stop), self.bits)[:, : self.shape[1]]
        return (codes - self._spread(self.zeros(start, stop))) * self._spread(self.scales(start, stop))

    def affine_scales(self, start: int, stop: int) -> mx.array:
        """Scales of rows start:stop as MLX's groups need them."""
        return self._by_mlx_group(self.scales(start, stop))

    def affine_biases(self, start: int, stop: int) -> mx.array:
        """Values of code 0 in rows start:stop."""
        return self._by_mlx_group(-self.scales(start, stop) * self.zeros(start, stop))

    def _by_mlx_group(self, per_group: mx.array) -> mx.array:
        assert self.affine is not None, "asked for only where MLX can hold the codes"
        group_size, K = self.affine.group_size, self.shape[1]
        return mx.repeat(per_group, min(self.group_size, K) // group_size, axis=1)[:, : K // group_size]

    def _spread(self, per_group: mx.array) -> mx.array:
        """[rows, groups] -> [rows, K]"""
        if self.order is not None:
            return mx.take(per_group, self.order.read(), axis=1)
        return mx.repeat(per_group, self.group_size, axis=1)[:, : self.shape[1]]


def act_order(g_idx: TensorInfo, group_size: int, groups: int) -> TensorInfo | None:
    """`g_idx` [K], the group of each column, or None if the groups are consecutive."""
    order = g_idx.read()
    if mx.array_equal(order, mx.arange(order.size, dtype=order.dtype) // group_size):
        return None
    if mx.any((order < 0) | (order >= groups)):
        raise CheckpointError(
            f"{g_idx.name} in {g_idx.file.name} names groups beyond the {groups} that have scales. The file is "
            "damaged: download the folder again."
        )
    return g_idx


def stated_group_size(stated: int | None, scales: TensorInfo, groups: int, K: int) -> int:
    """How many of K inputs share one of the `scales`, of which there are `groups`; the last group may be shorter.

    `stated` is config.json's word on it, −1 for one group, None where it has none. Raises CheckpointError where the
    scales are of another number.
    """
    if stated is None and K % groups == 0:
        return K // groups
    size = K if stated == -1 else stated or 0
    if size < 1 or -(-K // size) != groups:
        raise CheckpointError(
            f"{scales.name} in {scales.file.name} has {groups} groups for {K} inputs, config.json says group_size "
            f"{stated!r}. The file is damaged, or config.json belongs to other weights: download the folder again."
        )
    return min(size, K)


def block(bits: int) -> tuple[int, int]:
    """The least number of codes that fill whole words, and of these words: (8, 1) for 4 bits, (32, 3) for 3."""
    shared = gcd(bits, 32)
    return 32 // shared, bits // shared


def unpack(words: mx.array, bits: int) -> mx.array:
    """Codes [..., W · 32 / bits] of uint32 words [..., W], the lowest bits first, running on into the next word."""
    if bits == 8:
        return words.view(mx.uint8)
    count, width = block(bits)
    first = [i * bits for i in range(count)]
    blocks = words.reshape(*words.shape[:-1], -1, width)
    places = mx.array([bit // 32 for bit in first])
    codes = mx.take(blocks, places, axis=-1) >> mx.array([bit % 32 for bit in first], dtype=mx.uint32)
    if width > 1:
        # What a code has in the next word; a shift by 32 and more, where it has nothing there, is undefined.
        over = [bit % 32 + bits > 32 for bit in first]
        shifts = mx.array(
            [32 - bit % 32 if more else 0 for bit, more in zip(first, over, strict=True)], dtype=mx.uint32
        )
        rest = mx.take(blocks, mx.minimum(places + 1, width - 1), axis=-1) << shifts
        codes = codes | mx.where(mx.array(over), rest, 0)
    return (codes & mx.array((1 << bits) - 1, dtype=mx.uint32)).astype(mx.uint8).flatten(-2)


def pack(codes: mx.array, bits: int) -> mx.array:
    """The uint32 words that `unpack` would turn into these codes."""
    if bits == 8:
        return mx.contiguous(codes.astype(mx.uint8)).view(mx.uint32)
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    fields = codes.astype(mx.uint32).reshape(*codes.shape[:-1], -1, 32 // bits)
    return (fields << shifts).sum(axis=-1)
