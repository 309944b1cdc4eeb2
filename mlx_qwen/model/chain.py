"""Keys and values that only grow, as values.

Chains that came out of each other share buffers, in which a chain is the tokens before its length. Whoever goes on
with the longest chain writes behind it, in place; who goes on from a shorter one, while a longer one is held, gets
buffers of his own. A chain that was lent is only read, and hinders nobody: where a shorter one is to be written over
its tokens, it moves to buffers of its own.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from weakref import ref

import mlx.core as mx

_STEP = 256


class Quantized(NamedTuple):
    """Rows packed by `mx.quantize` along their last axis."""

    packed: mx.array
    scales: mx.array
    biases: mx.array


class Packing(NamedTuple):
    """How keys and values are packed: `bits` a channel, in groups of `group_size` channels."""

    bits: int
    group_size: int


Rows = mx.array | Quantized


class _Buffers:
    """Room for keys and values, [2, B, Hkv, capacity, D] a layer, and the chains that lie in it.

    `capacity` is known also where there are no layers, on a rank without attention.
    """

    def __init__(self, layers: list[Rows | None], packing: Packing | None, capacity: int = 0) -> None:
        self.layers = layers
        self.packing = packing
        self.capacity = capacity
        self._chains: list[ref[Chain]] = []
        self._lent: list[ref[Chain]] = []

    def lies_in(self, chain: "Chain") -> None:
        """Note a chain that these hold, and forget those that are gone."""
        self._chains = [*(held for held in self._chains if held() is not None), ref(chain)]

    def is_lent(self, chain: "Chain") -> None:
        """Note a chain that is only read."""
        self._lent = [*(held for held in self._lent if held() is not None), ref(chain)]

    def give_way(self, length: int) -> None:
        """Let tokens behind the first `length` be written: lent chains that hold them move away."""
        for held in self._lent:
            chain = held()
            if chain is not None and chain.length > length:
                chain.move()

    def reserve(self, length: int, room: int) -> None:
        """Note that there is room for `length` tokens, and for `room` where it has to be made."""
        self.capacity = _capacity(self.capacity, length, room)

    @property
    def longest(self) -> int:
        """The length of the longest chain that is held."""
        return max((chain.length for held in self._chains if (chain := held()) is not None), default=0)

    def first(self, length: int) -> "_Buffers":
        """A copy that holds the first `length` tokens."""
        copied = [None if rows is None or not length else _copied(rows, length) for rows in self.layers]
        return _Buffers(copied, self.packing, _capacity(0, length))


class Chain:
    """Keys and values of the attention layers, as a value: those of the first `length` tokens of its buffers.

    One sequence has a chain, or B sequences of equal length (left padding counted) share one.
    """

    __slots__ = ("__weakref__", "_buffers", "_room", "length")

    def __init__(self, buffers: _Buffers, length: int, room: int = 0) -> None:
        self.length = length
        self._room = room
        self._buffers = buffers
        buffers.lies_in(self)

    @property
    def place(self) -> int:
        """The same number for all chains, held at the same time, that lie in the same buffers."""
        return id(self._buffers)

    @property
    def capacity(self) -> int:
        """For how many tokens its buffers have room."""
        return self._buffers.capacity

    @classmethod
    def empty(cls, layers: int, packing: Packing | None = None) -> "Chain":
        """The chain of `layers` attention layers before the first token."""
        return cls(_Buffers([None] * layers, packing), 0)

    @property
    def packing(self) -> Packing | None:
        """How the rows are packed; None where they are not."""
        return self._buffers.packing

    @property
    def is_shared(self) -> bool:
        """Whether a longer chain is held in the same buffers, so that growing this one copies it."""
        return self._buffers.longest > self.length

    def grown(self, tokens: int, room: int = 0) -> "Chain":
        """The chain with `tokens` more, which are to be written layer by layer.

        Buffers that are made for them have room for `room` tokens in all: growing them copies what is in them.
        """
        buffers = self._buffers
        if self.is_shared:
            buffers = buffers.first(self.length)
        else:
            buffers.give_way(self.length)
        buffers.reserve(self.length + tokens, room)
        return Chain(buffers, self.length + tokens, room)

    def cut(self, length: int) -> "Chain":
        """The first `length` tokens."""
        return self if length == self.length else Chain(self._buffers, length)

    def lent(self) -> "Chain":
        """The same for who only reads it: how long he does changes nothing for other chains."""
        lent = Chain.__new__(Chain)
        lent.length, lent._room, lent._buffers = self.length, 0, self._buffers
        self._buffers.is_lent(lent)
        return lent

    def move(self) -> None:
        """Lie in buffers of its own from now on."""
        self._buffers = self._buffers.first(self.length)
        mx.eval(self.buffers())

    def write(self, layer: int, kv: mx.array) -> tuple[Rows, Rows]:
        """Write the last tokens' keys and values [2, B, Hkv, T, D] of attention layer number `layer`.

        Returns:
            All keys and all values, each [B, Hkv, length, D] (packed, where the chain is).
        """
        held, start = self._buffers.layers[layer], self.length - kv.shape[3]
        if self.packing is None:
            assert held is None or isinstance(held, mx.array), "a chain is packed as a whole or not at all"
            written = self._buffers.layers[layer] = _written(held, kv, start, self._room)
            return _halves(written, self.length)
        parts = mx.quantize(kv, group_size=self.packing.group_size, bits=self.packing.bits)
        before = (None, None, None) if held is None else held
        all_parts = Quantized(*(_written(old, new, start, self._room) for old, new in zip(before, parts, strict=True)))
        self._buffers.layers[layer] = all_parts
        keys, values = zip(*(_halves(part, self.length) for part in all_parts), strict=True)
        return Quantized(*keys), Quantized(*values)

    def read(self, layer: int) -> Rows | None:
        """Keys and values [2, B, Hkv, length, D] of attention layer number `layer`; None before the first token."""
        held = self._buffers.layers[layer]
        return None if held is None or not self.length else _cut(held, self.length)

    def mapped(self, change: Callable[[mx.array], mx.array]) -> "Chain":
        """The chain with each of its arrays replaced by what `change` makes of it, of the same shape."""
        changed = [None if rows is None else _mapped(rows, change) for rows in self._buffers.layers]
        return Chain(_Buffers(changed, self.packing, self.capacity), self.length)

    def buffers(self) -> list[mx.array]:
        """The arrays that the chain lies in, for `mx.eval` and for adding up bytes."""
        return [part for rows in self._buffers.layers if rows is not None for part in _parts(rows)]

    @classmethod
    def holding(cls, rows: Sequence[Rows | None], length: int, packing: Packing | None = None) -> "Chain":
        """A chain of rows that were read from another, [2, B, Hkv, length, D] a layer."""
        copied = [None if part is None else _copied(part, length) for part in rows]
        return cls(_Buffers(copied, packing, _capacity(0, length)), length)


def keys_and_values(kv: mx.array) -> tuple[mx.array, mx.array]:
    """The halves of [2, ...], as views."""
    keys, values = mx.split(kv, 2)
    return keys.squeeze(0), values.squeeze(0)


def _halves(held: mx.array, length: int) -> tuple[mx.array, mx.array]:
    """The first `length` tokens of the halves of a buffer, as views, in fewer nodes than slices."""
    _, *shape, capacity, D = held.shape
    flat, half = held.flatten(), held.size // 2
    strides = (half // shape[0], capacity * D, D, 1)
    keys, values = (mx.as_strided(flat, (*shape, length, D), strides, offset) for offset in (0, half))
    return keys, values


def _parts(rows: Rows) -> tuple[mx.array, ...]:
    return rows if isinstance(rows, Quantized) else (rows,)


def _cut(rows: Rows, length: int) -> Rows:
    cut = [part[..., :length, :] for part in _parts(rows)]
    return Quantized(*cut) if isinstance(rows, Quantized) else cut[0]


def _mapped(rows: Rows, change: Callable[[mx.array], mx.array]) -> Rows:
    changed = [change(part) for part in _parts(rows)]
    return Quantized(*changed) if isinstance(rows, Quantized) else changed[0]


def _copied(rows: Rows, length: int) -> Rows:
    copies = [_written(None, part[..., :length, :], 0) for part in _parts(rows)]
    return Quantized(*copies) if isinstance(rows, Quantized) else copies[0]


def _capacity(capacity: int, length: int, least: int = 0) -> int:
    """What buffers of `capacity` have room for once there is some for `length` tokens, made for `least` if need be."""
    return capacity if length <= capacity else -(-max(length, least) // _STEP) * _STEP


def _written(held: mx.array | None, new: mx.array, start: int, least: int = 0) -> mx.array:
    """`new` [..., T, D] written behind the first `start` tokens of `held`.

    When it is full in a larger buffer, which has room for `least` tokens.
    """
    *outer, T, D = new.shape
    capacity = 0 if held is None else held.shape[-2]
    if start + T > capacity:
        room = mx.zeros((*outer, _capacity(capacity, start + T, least) - start, D), dtype=new.dtype)
        held = room if held is None else mx.concatenate([held[..., :start, :], room], axis=-2)
    assert held is not None, "a buffer exists once there is room"
    held[:, :, :, start : start + T] = new
    return held
