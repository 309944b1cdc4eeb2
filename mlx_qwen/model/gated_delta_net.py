"""Gated DeltaNet: linear attention whose memory does not grow.

Source: Yang et al., "Gated Delta Networks" (2024), and transformers' `Qwen3_5GatedDeltaNet`.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from metal_kernels.gated_delta import Heads, Mixer, Tape, gated_delta_mixer
from mlx_qwen.config import TextConfig
from mlx_qwen.model.layers import AnyLinear, FusedLinear
from mlx_qwen.model.state import LinearState


class _Weight(nn.Module):
    """A bare weight under the checkpoint's name; the mixer applies it."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = mx.ones(shape)


class Mixed(NamedTuple):
    """What a Gated DeltaNet layer leaves: its output [B, T, hidden], its memory, and a tape of the step if asked."""

    output: mx.array
    memory: LinearState
    tape: Tape | None


class GatedDeltaNet(nn.Module):
    """Projections around the gated delta rule: `in_proj_qkvz` has the rows of q, k, v, z, `in_proj_ba` of b, a."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        heads, value_dim = config.linear_num_value_heads, config.linear_value_dim
        self.in_proj_qkvz = FusedLinear(config.hidden_size, [config.linear_conv_dim + value_dim])
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * heads, bias=False)
        self.conv1d = _Weight(config.linear_conv_dim, config.linear_conv_kernel_dim, 1)
        self.A_log = mx.zeros(heads)
        self.dt_bias = mx.ones(heads)
        self.norm = _Weight(config.linear_value_head_dim)
        self.out_proj: AnyLinear = nn.Linear(value_dim, config.hidden_size, bias=False)
        self.heads = Heads(config.linear_num_key_heads, config.linear_key_head_dim, heads, config.linear_value_head_dim)
        self.eps = config.rms_norm_eps

    def __call__(
        self, x: mx.array, memory: LinearState | None = None, mask: mx.array | None = None, *, tape: bool = False
    ) -> Mixed:
        """x [B, T, hidden] goes on after `memory`; `mask` bool [B, T] is False where x is left padding."""
        mixed = gated_delta_mixer(
            self.in_proj_qkvz(x),
            x,
            self.in_proj_ba.weight,
            Mixer(self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, self.eps, self.heads),
            conv_state=None if memory is None else memory.conv_state,
            state=None if memory is None else memory.state,
            mask=mask,
            tape=tape,
        )
        return Mixed(self.out_proj(mixed.y), LinearState(mixed.conv_state, mixed.state), mixed.tape)
