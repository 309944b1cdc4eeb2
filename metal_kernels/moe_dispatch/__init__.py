"""Top-k dispatch of tokens to the sparse experts of a mixture-of-experts layer."""

from metal_kernels.moe_dispatch.op import (
    combine,
    expert_down_combine,
    expert_gate_up,
    mlp_gate_up,
    route,
    routed_mlp,
    sort_by_expert,
    sparse_mlp,
    swiglu,
)
from metal_kernels.moe_dispatch.weights import ExpertWeights, Routing, SparseWeights

__all__ = [
    "ExpertWeights",
    "Routing",
    "SparseWeights",
    "combine",
    "expert_down_combine",
    "expert_gate_up",
    "mlp_gate_up",
    "route",
    "routed_mlp",
    "sort_by_expert",
    "sparse_mlp",
    "swiglu",
]
