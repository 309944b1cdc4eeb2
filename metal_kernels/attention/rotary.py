"""Rotary positions: plain ones of text, or interleaved M-RoPE's three axes (Su et al., 2021; Qwen3-VL, 2025)."""

import struct
from dataclasses import dataclass
from functools import cache

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotation of the first `dims` of a head's dimensions, halves paired as in GPT-NeoX.

    Attributes:
        dims: even, at least 2.
        theta: the base; pair i turns by theta^(-2 i / dims) a position.
        section: how many pairs the time, height and width positions turn; None when there is one axis.
        turns: what each pair turns by a position, in radians, where that follows from more than `theta`.
    """

    dims: int
    theta: float
    section: tuple[int, int, int] | None = None
    turns: tuple[float, ...] | None = None

    @property
    def wavelengths(self) -> mx.array:
        """theta^(2 i / dims), fp32 [dims / 2], whatever `turns` say."""
        return _wavelengths(self)

    @property
    def frequencies(self) -> mx.array:
        """What each pair turns by a position, in radians: fp32 [dims / 2].

        Rounded step by step as transformers does: at position 262,144 an error of one unit in the last place of a
        frequency turns a pair by 0.01.
        """
        return _frequencies(self)

    @property
    def axes(self) -> mx.array:
        """Which of the three positions turns each pair, int32 [dims / 2]: t h w t h w … while h and w last, then t."""
        return _axes(self)


def rotate(x: mx.array, rotary: Rotary, positions: mx.array) -> mx.array:
    """Rotate x [B, heads, T, D]; `positions` as in `attention_prologue`."""
    if rotary.turns is not None and positions.ndim < 3:  # their reciprocals, as rope takes them, would be rounded again
        positions = (positions.reshape(-1, 1) + mx.arange(x.shape[2]))[None]
        positions = mx.broadcast_to(positions, (3, *positions.shape[1:]))
    if positions.ndim < 3:
        freqs = rotary.wavelengths
        return mx.fast.rope(x, rotary.dims, traditional=False, base=None, scale=1.0, offset=positions, freqs=freqs)
    by_pair = mx.take(positions, rotary.axes, axis=0)  # [dims / 2, B, T]
    angles = by_pair.transpose(1, 2, 0)[:, None].astype(mx.float32) * rotary.frequencies
    cos, sin = mx.cos(angles), mx.sin(angles)
    first, second, rest = mx.split(x, [rotary.dims // 2, rotary.dims], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return mx.concatenate([part.astype(x.dtype) for part in rotated] + [rest], axis=-1)


def _fp32(value: float) -> float:
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def _rounded_wavelengths(rotary: Rotary) -> list[float]:
    return [_fp32(_fp32(rotary.theta) ** _fp32(i / rotary.dims)) for i in range(0, rotary.dims, 2)]


@cache
def _wavelengths(rotary: Rotary) -> mx.array:
    return mx.array(_rounded_wavelengths(rotary))


@cache
def _frequencies(rotary: Rotary) -> mx.array:
    if rotary.turns is not None:
        return mx.array(rotary.turns)
    return mx.array([_fp32(1 / wavelength) for wavelength in _rounded_wavelengths(rotary)])


@cache
def _axes(rotary: Rotary) -> mx.array:
    half = rotary.dims // 2
    _, height, width = rotary.section or (half, 0, 0)
    return mx.array(
        [1 if i % 3 == 1 and i < 3 * height else 2 if i % 3 == 2 and i < 3 * width else 0 for i in range(half)]
    )
