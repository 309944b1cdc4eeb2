"""Where tokens stand: plain positions of text, or three axes (time, height, width) where images are."""

from dataclasses import dataclass

import mlx.core as mx

from metal_kernels.attention import Rotary
from mlx_qwen.config import RopeConfig


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


def rotary(head_dim: int, config: RopeConfig) -> Rotary:
    """The rotation of heads of `head_dim` dimensions."""
    return Rotary(int(head_dim * config.partial_rotary_factor), config.theta, config.mrope_section)
