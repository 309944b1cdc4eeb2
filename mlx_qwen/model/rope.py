"""Where tokens stand: plain positions of text, or three axes (time, height, width) where images are."""

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from metal_kernels.attention import Rotary
from mlx_qwen.rope_config import RopeConfig, Yarn


@dataclass(frozen=True, slots=True)
class Positions:
    """Where the tokens of one call stand.

    `offset` is the position of the first token, an array [] or [B] so that a replayed graph can take it as an input.
    `axes` [3, B, T] holds M-RoPE's time, height and width positions where they differ, and replaces `offset` then.
    """

    offset: mx.array
    axes: mx.array | None = None

    @property
    def array(self) -> mx.array:
        """The positions as attention takes them: `axes`, or `offset` where there are none."""
        return self.offset if self.axes is None else self.axes

    def behind(self, tokens: int) -> "Positions":
        """Where the tokens behind the first `tokens` stand."""
        return Positions(self.offset + tokens, None if self.axes is None else self.axes[..., tokens:])


def rotary(head_dim: int, config: RopeConfig) -> Rotary:
    """The rotation of heads of `head_dim` dimensions; its scale is `rotary_scale`'s."""
    dims = int(head_dim * config.partial_rotary_factor)
    turns = None if config.yarn is None else _yarn_turns(dims, config.theta, config.yarn)
    return Rotary(dims, config.theta, config.mrope_section, turns)


def rotary_scale(head_dim: int, config: RopeConfig) -> mx.array | None:
    """What YaRN multiplies each dimension [head_dim] of queries and keys by, fp32; None for nothing.

    It is part of the factors of their norms, which a rotation of pairs commutes with.
    """
    if config.yarn is None or config.yarn.attention_factor == 1:
        return None
    dims = int(head_dim * config.partial_rotary_factor)
    return mx.where(mx.arange(head_dim) < dims, config.yarn.attention_factor, 1.0).astype(mx.float32)


def _yarn_turns(dims: int, theta: float, yarn: Yarn) -> tuple[float, ...]:
    """What each pair turns by a position, in radians, rounded step by step as transformers does."""

    def pair(turns: float) -> float:
        """The pair that turns so many times within the original positions."""
        return dims * math.log(yarn.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(yarn.beta_fast), pair(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    one, exponents = np.float32(1), np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    wavelengths = (float(np.float32(theta)) ** exponents.astype(np.float64)).astype(np.float32)
    ramp = np.clip((np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = one - ramp
    turns = one / (np.float32(yarn.factor) * wavelengths) * (one - kept) + one / wavelengths * kept
    return tuple(turns.astype(np.float32).tolist())
