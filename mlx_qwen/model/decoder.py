"""One decoder layer: a token mixer and a feed-forward half, each behind a norm that adds the half before it."""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen.config import TextConfig
from mlx_qwen.model.attention import Attention, KeyValues
from mlx_qwen.model.collectives import summed
from mlx_qwen.model.gated_delta_net import GatedDeltaNet, Mixed
from mlx_qwen.model.layers import RMSNorm
from mlx_qwen.model.mlp import MLP, SparseMoE
from mlx_qwen.model.rope import Positions
from mlx_qwen.model.state import LinearState


class Residual(NamedTuple):
    """The residual stream and the output of the last branch, which the next norm adds to it; both [B, T, hidden].

    The stream is fp32 from the first sum on. Norms are of `dtype`, the branch's own unless a sum over ranks made it
    wider.
    """

    stream: mx.array
    branch: mx.array | None = None
    dtype: mx.Dtype | None = None

    def sum(self) -> mx.array:
        """The stream with every branch added."""
        return self.stream if self.branch is None else self.stream + self.branch

    def normed(self, norm: RMSNorm) -> tuple[mx.array, mx.array]:
        """The sum and its norm, in one launch unless dtypes differ."""
        if self.branch is None:
            return self.stream, norm(self.stream)
        if self.dtype is None or self.dtype == self.branch.dtype:
            return norm.of_sum(self.stream, self.branch)
        return (total := self.sum()), norm(total, self.dtype)


class Masks(NamedTuple):
    """Masks of a left-padded batch.

    `real` is bool [B, T], False where a new token is padding, or None when none is; `attention` is bool [B, 1, T, S].
    """

    real: mx.array | None
    attention: mx.array


class DecoderLayer(nn.Module):
    """Attention (`self_attn`) or Gated DeltaNet (`linear_attn`), then `mlp`.

    With a `group` each half gives this rank's part of its output, and the sum over ranks completes it.
    """

    def __init__(
        self, config: TextConfig, *, linear: bool, sparse: bool, group: mx.distributed.Group | None = None
    ) -> None:
        super().__init__()
        self._group = group
        self.is_linear = linear
        if linear:
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = Attention(config)
        if sparse:
            assert config.moe is not None, "only configs with experts have sparse layers"
            self.mlp: MLP | SparseMoE = SparseMoE(config.hidden_size, config.moe)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        entering: Residual,
        positions: Positions,
        memory: KeyValues | LinearState | None = None,
        masks: Masks | None = None,
    ) -> Residual:
        """One layer on; `masks` where rows have left padding. See `mix` for what a linear layer remembers."""
        if self.is_linear:
            assert memory is None or isinstance(memory, LinearState), "linear layers remember a state"
            return self.mix(entering, memory, masks)[0]
        assert memory is None or isinstance(memory, KeyValues), "attention layers remember keys and values"
        x, normed = entering.normed(self.input_layernorm)
        attended = self.self_attn(normed, positions, memory, masks and masks.attention)
        return self.feed_forward(Residual(x, attended))

    def mix(
        self, entering: Residual, memory: LinearState | None, masks: Masks | None = None, *, tape: bool = False
    ) -> tuple[Residual, Mixed]:
        """One Gated DeltaNet layer on, and what it leaves; with `tape` the step can be taken back in part."""
        x, normed = entering.normed(self.input_layernorm)
        mixed = self.linear_attn(normed, memory, masks and masks.real, tape=tape)
        return self.feed_forward(Residual(x, mixed.output)), mixed

    def last(self, entering: Residual, positions: Positions, memory: KeyValues, masks: Masks | None) -> Residual:
        """An attention layer on for the last token alone, [B, 1, hidden]; keys and values of all are remembered."""
        x, normed = entering.normed(self.input_layernorm)
        alone = self.self_attn.heads_of_last(normed, positions)
        mask = None if masks is None else masks.attention[:, :, -1:]
        attended = self.self_attn.output(self.self_attn.attend(alone, memory, mask), alone.gate)
        return self.feed_forward(Residual(x[:, -1:], attended))

    def feed_forward(self, mixed: Residual) -> Residual:
        """The second half of the layer, behind its mixer."""
        x, normed = self._whole(mixed).normed(self.post_attention_layernorm)
        return self._whole(Residual(x, self.mlp(normed)))

    def _whole(self, part: Residual) -> Residual:
        """The same with all ranks' parts of the branch, of which `part` has this one's."""
        if self._group is None or part.branch is None:
            return part
        return Residual(part.stream, summed(part.branch, self._group), part.branch.dtype)
