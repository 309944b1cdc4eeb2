"""What the operations of a Gated DeltaNet layer know of it: its heads, and its weights between the projections."""

from typing import NamedTuple

import mlx.core as mx


class Heads(NamedTuple):
    """Numbers and sizes of a layer's heads: Hk, Dk, Hv, Dv."""

    num_key: int
    key_dim: int
    num_value: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Channels of the convolution: q, k and v of all heads."""
        return 2 * self.num_key * self.key_dim + self.num_value * self.value_dim


class Mixer(NamedTuple):
    """A layer's weights between its input projections and its output projection.

    Attributes:
        conv_weight: [2 Hk Dk + Hv Dv, W, 1].
        A_log, dt_bias: [Hv].
        norm_weight: [Dv], the factor itself.
        eps: of the norm, added to the mean of squares.
        heads: Hk, Dk, Hv, Dv.
    """

    conv_weight: mx.array
    A_log: mx.array
    dt_bias: mx.array
    norm_weight: mx.array
    eps: float
    heads: Heads
