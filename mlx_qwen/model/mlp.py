"""The feed-forward halves of a decoder layer: a dense MLP, or sparse experts beside a shared one."""

import mlx.core as mx
import mlx.nn as nn

from metal_kernels.moe_dispatch import ExpertWeights, SparseWeights, mlp_gate_up, routed_mlp
from mlx_qwen.config import MoEConfig
from mlx_qwen.model.layers import AnyExpertLinear, AnyLinear, ExpertLinear, FusedLinear


class MLP(nn.Module):
    """down(SiLU(gate(x)) · up(x)), gate and up read as one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = FusedLinear(hidden_size, [2 * intermediate_size])
        self.down_proj: AnyLinear = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = self.down_proj(mlp_gate_up(x, *self.gate_up))
        return output

    @property
    def gate_up(self) -> tuple[ExpertWeights, ...]:
        """The matrices of gate and up, gate rows before up rows, without copies."""
        return tuple(_weights(part) for part in self.gate_up_proj.parts)


class Experts(nn.Module):
    """The matrices of all experts, gate rows before up rows."""

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.gate_up_proj: AnyExpertLinear = ExpertLinear(moe.num_experts, hidden_size, 2 * moe.moe_intermediate_size)
        self.down_proj: AnyExpertLinear = ExpertLinear(moe.num_experts, moe.moe_intermediate_size, hidden_size)


class SparseMoE(nn.Module):
    """The k best of E experts, weighted by the router, plus a shared expert behind a sigmoid gate.

    `router` has E + 1 rows: the experts' logits and the shared expert's gate.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.num_experts_per_tok = moe.num_experts_per_tok
        self.normalize = moe.norm_topk_prob
        self.router = FusedLinear(hidden_size, [moe.num_experts + 1])
        self.switch_mlp = Experts(hidden_size, moe)
        self.shared_expert = MLP(hidden_size, moe.shared_expert_intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows)
        mixed = routed_mlp(rows, logits, self.num_experts_per_tok, self.weights, normalize=self.normalize)
        return mixed.reshape(x.shape)

    @property
    def weights(self) -> SparseWeights:
        """The matrices that a token may pass through, without copies."""
        experts, shared = self.switch_mlp, self.shared_expert
        return SparseWeights(
            experts.gate_up_proj.weights,
            experts.down_proj.weights,
            shared.gate_up,
            _weights(shared.down_proj),
        )


def _weights(linear: AnyLinear) -> ExpertWeights:
    if isinstance(linear, nn.Linear):
        return ExpertWeights(linear.weight)
    biases = linear.get("biases")
    return ExpertWeights(linear.weight, linear.scales, biases, linear.group_size, linear.bits, linear.mode)
