"""What a model calls: the steps of a sparse layer, with the choice between kernel and reference."""

import math

import mlx.core as mx

from metal_kernels._backend import Backend, backend, count_reference, takes_kernel
from metal_kernels._choices import MOST_EXPERT_ROWS, choices
from metal_kernels.moe_dispatch import kernels, reference
from metal_kernels.moe_dispatch.weights import ExpertWeights, Routing, SparseWeights

_FLOATS = (mx.float32, mx.bfloat16, mx.float16)
_PACKINGS = {
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
}
_MAX_EXPERTS = 1024
_MAX_CHOSEN = 16
# MLX passes smaller arrays in another address space.
_SMALLEST_DEVICE_ARRAY = 8


def route(logits: mx.array, k: int, *, normalize: bool = True) -> Routing:
    """Choose k experts for every token.

    Softmax over all experts in fp32, then the k largest in the order of a stable ascending sort (that of
    `mx.argpartition` on a GPU: ties keep the higher expert), then division by their sum; and the sigmoid of the shared
    expert's gate. The kernel makes the same choice in the same order, scores within 1e-6; only two experts whose
    probabilities differ in the last bits may change places.

    Args:
        logits: [N, E + 1], any float dtype, read through its strides; the last column is the shared expert's gate.
        k: experts per token, 1 to E.
        normalize: whether the k scores are divided by their sum.

    Raises:
        ValueError: k is not between 1 and E.
    """
    E = logits.shape[-1] - 1
    if not 1 <= k <= E:
        raise ValueError(f"route: k is {k}, expected 1 to {E}, the number of experts (logits has one column more)")
    reason = _empty(logits) or _unroutable(logits.dtype, E, k)
    if not takes_kernel("route", reason):
        return reference.route(logits, k, normalize=normalize)
    return kernels.route(logits, k, normalize=normalize)


def routed_mlp(x: mx.array, logits: mx.array, k: int, weights: SparseWeights, *, normalize: bool = True) -> mx.array:
    """What `sparse_mlp` makes of `route`; for a few rows in two launches, the first of which finds the experts too.

    Args and errors are theirs: x [N, K], logits [N, E + 1]. The kernel chooses the experts that `route`'s does.
    """
    if backend() is Backend.METAL and x.shape[0] <= choices().expert_rows:
        E, matrices = logits.shape[-1] - 1, (weights.gate_up, *weights.shared_gate_up)
        reason = _empty(x) or _unroutable(logits.dtype, E, k) or _unmultipliable(x, k, *matrices)
        if 1 <= k <= E and takes_kernel("routed_gate_up", reason):
            found = kernels.routed_gate_up(
                x, logits, k, weights.gate_up, weights.shared_gate_up[0], normalize=normalize
            )
            return expert_down_combine(*found, weights)
    return sparse_mlp(x, route(logits, k, normalize=normalize), weights)


def sparse_mlp(x: mx.array, routing: Routing, weights: SparseWeights) -> mx.array:
    """Apply each token's experts and the shared expert, weighted by their scores.

    Each is down(SiLU(gate(x)) · up(x)). A few rows (`Choices.expert_rows`) run as two kernels; more are sorted by
    expert, so that each expert's matrices are read once, and multiplied by MLX's own gathered matmul, which finds the
    runs of equal experts itself and so needs no map of tiles.

    Args:
        x: [N, K], any float dtype.
        routing: from `route`.
        weights: see `SparseWeights`.

    Returns:
        [N, K] in x's dtype; the sum over experts is fp32 and rounded once.
    """
    if backend() is Backend.REFERENCE or not x.size:
        count_reference("sparse_mlp", _empty(x) or "reference backend")
        return reference.sparse_mlp(x, routing, weights)
    if x.shape[0] <= choices().expert_rows:
        hidden, shared_hidden = expert_gate_up(x, routing.indices, weights)
        return expert_down_combine(hidden, shared_hidden, routing, weights)
    tokens, experts, places = sort_by_expert(routing.indices, weights.gate_up.weight.shape[0])
    hidden = swiglu(reference.gathered_matmul(x[tokens][:, None], weights.gate_up, experts, sorted_indices=True))
    outputs = reference.gathered_matmul(hidden, weights.down, experts, sorted_indices=True)[:, 0]
    shared_hidden = swiglu(reference.matmul(x, *weights.shared_gate_up))
    return combine(outputs, places, routing, reference.matmul(shared_hidden, weights.shared_down))


def expert_gate_up(x: mx.array, indices: mx.array, weights: SparseWeights) -> tuple[mx.array, mx.array]:
    """Apply experts and shared expert up to their activation: SiLU(x Wgᵀ) · (x Wuᵀ).

    The kernel multiplies in fp32 and rounds the activation once, where the reference rounds the products too.

    Args:
        x: [N, K], any float dtype.
        indices: uint32 [N, k], the experts of each token.
        weights: `gate_up` and `shared_gate_up` are used.

    Returns:
        hidden [N, k, I] and shared_hidden [N, Is] in x's dtype.
    """
    reason = _empty(x) or _unmultipliable(x, indices.shape[1], weights.gate_up, *weights.shared_gate_up)
    if not takes_kernel("expert_gate_up", reason):
        return reference.expert_gate_up(x, indices, weights)
    return kernels.expert_gate_up(x, indices, weights.gate_up, weights.shared_gate_up[0])


def mlp_gate_up(x: mx.array, *row_blocks: ExpertWeights) -> mx.array:
    """A dense MLP up to its activation: SiLU(x Wgᵀ) · (x Wuᵀ), for a few rows (`Choices.mlp_rows`) in one launch.

    Args:
        x: [..., K], any float dtype.
        row_blocks: [2 I, K], the rows of the gate before those of up, in as many pieces as have a precision of their
            own; only one piece has a kernel, which rounds as `expert_gate_up` does.

    Returns:
        [..., I] in x's dtype.
    """
    rows = math.prod(x.shape[:-1])
    suits = backend() is Backend.METAL and len(row_blocks) == 1 and rows <= choices().mlp_rows
    if suits and takes_kernel("mlp_gate_up", _empty(x) or _unmultiplied(x, *row_blocks)):
        return kernels.mlp_gate_up(x, row_blocks[0])
    return swiglu(reference.matmul(x, *row_blocks))


def expert_down_combine(
    hidden: mx.array, shared_hidden: mx.array, routing: Routing, weights: SparseWeights
) -> mx.array:
    """Bring activations down and add them up: Σ_k score · (h Wdᵀ) + shared score · (h_shared Wd_sharedᵀ).

    The kernel multiplies and sums in fp32, slot by slot, and rounds once, where the reference rounds the products too.

    Args:
        hidden: [N, k, I]; shared_hidden: [N, Is], both from `expert_gate_up`.
        routing: from `route`.
        weights: `down` and `shared_down` are used.

    Returns:
        [N, K] in hidden's dtype.
    """
    reason = _empty(hidden) or _unmultipliable(hidden, hidden.shape[1], weights.down, weights.shared_down)
    if not takes_kernel("expert_down_combine", reason):
        return reference.expert_down_combine(hidden, shared_hidden, routing, weights)
    return kernels.expert_down_combine(hidden, shared_hidden, routing, weights.down, weights.shared_down)


def sort_by_expert(indices: mx.array, num_experts: int) -> tuple[mx.array, mx.array, mx.array]:
    """Sort all (token, expert) pairs by expert, equal experts staying in order.

    Args:
        indices: uint32 [N, k], each below `num_experts`.
        num_experts: E.

    Returns:
        tokens and experts, uint32 [N k], of the sorted pairs; and the place of each pair among them, uint32 [N k].
    """
    if not takes_kernel("sort_by_expert", _empty(indices)):
        return reference.sort_by_expert(indices)
    return kernels.sort_by_expert(indices, num_experts)


def combine(outputs: mx.array, places: mx.array, routing: Routing, shared: mx.array) -> mx.array:
    """Add up sorted outputs of experts: Σ_k score · output + shared score · shared, in fp32, rounded once.

    Args:
        outputs: [N k, K], in the order of `sort_by_expert`; places: uint32 [N k], from there.
        routing: from `route`.
        shared: [N, K], the shared expert's output, in outputs' dtype.

    Returns:
        [N, K] in shared's dtype.
    """
    reason = _empty(outputs) or _not_in_fours(outputs, outputs.shape[-1]) or _too_small(places, shared)
    if not takes_kernel("combine", reason):
        return reference.combine(outputs, places, routing, shared)
    return kernels.combine(outputs, places, routing, shared)


def swiglu(gate_up: mx.array) -> mx.array:
    """SiLU of the first half of the last axis times the second half, in fp32, rounded once: [..., 2 I] to [..., I]."""
    reason = _empty(gate_up) or _not_in_fours(gate_up, gate_up.shape[-1] // 2)
    if not takes_kernel("swiglu", reason):
        return reference.swiglu(gate_up)
    return kernels.swiglu(gate_up)


def _empty(x: mx.array) -> str | None:
    return None if x.size else "empty input"


def _unroutable(dtype: mx.Dtype, E: int, k: int) -> str | None:
    if dtype not in _FLOATS:
        return f"logits of {dtype}"
    if E > _MAX_EXPERTS or k > _MAX_CHOSEN:
        return f"more than {_MAX_CHOSEN} of {_MAX_EXPERTS} experts"
    return None


def _unmultipliable(x: mx.array, k: int, *matrices: ExpertWeights) -> str | None:
    if len(matrices) != 2:
        return "shared gate and up of different precision"
    if x.shape[0] > MOST_EXPERT_ROWS or k > _MAX_CHOSEN:
        return f"more than {MOST_EXPERT_ROWS} rows or {_MAX_CHOSEN} experts a row"
    return _unmultiplied(x, *matrices)


def _unmultiplied(x: mx.array, *matrices: ExpertWeights) -> str | None:
    for matrix in matrices:
        packing = (matrix.mode, matrix.bits, matrix.group_size)
        if matrix.scales is not None and packing not in _PACKINGS:
            return f"{matrix.bits} bits {matrix.mode} in groups of {matrix.group_size}"
        if matrix.scales is None and matrix.weight.shape[-1] % kernels.DENSE_STEP:
            return f"columns not a multiple of {kernels.DENSE_STEP}"
        dtype = matrix.weight.dtype if matrix.scales is None else matrix.scales.dtype
        if matrix.scales is not None and matrix.mode != "affine":
            dtype = x.dtype
        if dtype != x.dtype or dtype not in _FLOATS:
            return f"activations of {x.dtype} and weights of {dtype}"
    return None


def _not_in_fours(x: mx.array, columns: int) -> str | None:
    if x.dtype not in _FLOATS:
        return f"activations of {x.dtype}"
    return f"{columns} columns, not a multiple of 4" if columns % 4 else None


def _too_small(*arrays: mx.array) -> str | None:
    smallest = min(x.size for x in arrays)
    return f"fewer than {_SMALLEST_DEVICE_ARRAY} elements" if smallest < _SMALLEST_DEVICE_ARRAY else None
