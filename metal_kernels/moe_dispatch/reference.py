"""Routing, gathered experts and their combination, in plain MLX: the definition.

Source: the sparse block of transformers' `Qwen3_5MoeSparseMoeBlock`.
"""

import mlx.core as mx

from metal_kernels.moe_dispatch.weights import ExpertWeights, Routing, SparseWeights

# From this many (token, expert) pairs on, sorting them by expert lets a gathered matmul read each expert once.
_SORT_FROM = 64


def route(logits: mx.array, k: int, *, normalize: bool) -> Routing:
    """See `metal_kernels.moe_dispatch.route`."""
    probabilities = mx.softmax(logits[:, :-1].astype(mx.float32), axis=-1)
    indices = mx.argsort(probabilities, axis=-1)[..., -k:]
    scores = mx.take_along_axis(probabilities, indices, axis=-1)
    if normalize:
        scores = scores / scores.sum(axis=-1, keepdims=True)
    return Routing(indices, scores, mx.sigmoid(logits[:, -1:].astype(mx.float32)))


def sparse_mlp(x: mx.array, routing: Routing, weights: SparseWeights) -> mx.array:
    """See `metal_kernels.moe_dispatch.sparse_mlp`."""
    if routing.indices.size < _SORT_FROM:
        hidden, shared_hidden = expert_gate_up(x, routing.indices, weights)
        return expert_down_combine(hidden, shared_hidden, routing, weights)
    tokens, experts, places = sort_by_expert(routing.indices)
    hidden = swiglu(gathered_matmul(x[tokens][:, None], weights.gate_up, experts, sorted_indices=True))
    outputs = gathered_matmul(hidden, weights.down, experts, sorted_indices=True)[:, 0]
    shared = matmul(swiglu(matmul(x, *weights.shared_gate_up)), weights.shared_down)
    return combine(outputs, places, routing, shared)


def expert_gate_up(x: mx.array, indices: mx.array, weights: SparseWeights) -> tuple[mx.array, mx.array]:
    """See `metal_kernels.moe_dispatch.expert_gate_up`."""
    both = gathered_matmul(x[:, None, None], weights.gate_up, indices)[:, :, 0]
    return swiglu(both), swiglu(matmul(x, *weights.shared_gate_up))


def expert_down_combine(
    hidden: mx.array, shared_hidden: mx.array, routing: Routing, weights: SparseWeights
) -> mx.array:
    """See `metal_kernels.moe_dispatch.expert_down_combine`."""
    outputs = gathered_matmul(hidden[:, :, None], weights.down, routing.indices)[:, :, 0]
    return _weighted_sum(outputs, routing, matmul(shared_hidden, weights.shared_down))


def sort_by_expert(indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """See `metal_kernels.moe_dispatch.sort_by_expert`."""
    pairs = indices.flatten()
    order = mx.argsort(pairs)
    return order // indices.shape[1], pairs[order], mx.argsort(order)


def combine(outputs: mx.array, places: mx.array, routing: Routing, shared: mx.array) -> mx.array:
    """See `metal_kernels.moe_dispatch.combine`."""
    return _weighted_sum(outputs[places.reshape(routing.indices.shape)], routing, shared)


def swiglu(gate_up: mx.array) -> mx.array:
    """See `metal_kernels.moe_dispatch.swiglu`."""
    gate, up = mx.split(gate_up.astype(mx.float32), 2, axis=-1)
    return (gate * mx.sigmoid(gate) * up).astype(gate_up.dtype)


def matmul(x: mx.array, *row_blocks: ExpertWeights) -> mx.array:
    """x [N, K] times the transpose of the matrix whose rows `row_blocks` hold in order: [N, all rows]."""
    blocks = [_one_matmul(x, block) for block in row_blocks]
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=-1)


def gathered_matmul(
    x: mx.array, experts: ExpertWeights, indices: mx.array, *, sorted_indices: bool = False
) -> mx.array:
    """x [..., 1, K] times the transpose of the matrix that `indices` [...] picks for each row: [..., 1, N]."""
    if experts.scales is not None:
        return mx.gather_qmm(
            x,
            experts.weight,
            experts.scales,
            experts.biases,
            rhs_indices=indices,
            transpose=True,
            group_size=experts.group_size,
            bits=experts.bits,
            mode=experts.mode,
            sorted_indices=sorted_indices,
        )
    weight = experts.weight
    if weight.dtype != mx.float32 and mx.default_device().type == mx.DeviceType.cpu:
        # MLX's CPU backend gathers fp32 only.
        x32, w32 = x.astype(mx.float32), weight.astype(mx.float32)
        return gathered_matmul(x32, ExpertWeights(w32), indices, sorted_indices=sorted_indices).astype(x.dtype)
    return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)


def _one_matmul(x: mx.array, matrix: ExpertWeights) -> mx.array:
    if matrix.scales is None:
        return x @ matrix.weight.T
    return mx.quantized_matmul(
        x, matrix.weight, matrix.scales, matrix.biases, True, matrix.group_size, matrix.bits, matrix.mode
    )


def _weighted_sum(outputs: mx.array, routing: Routing, shared: mx.array) -> mx.array:
    """Σ_k score · output [N, k, K] + the shared expert's score · its output [N, K], in fp32, rounded once."""
    experts = (outputs * routing.scores[..., None]).sum(axis=-2)
    return (experts + routing.shared_score * shared).astype(shared.dtype)
