"""The Metal kernels of a sparse layer and how they are launched; `op.py` says what they take."""

import math
from pathlib import Path

import mlx.core as mx

from metal_kernels._build import MetalKernel
from metal_kernels.moe_dispatch.weights import ExpertWeights, Routing

# Columns that a lane reads at once from a dense row.
DENSE_STEP = 8

_FOLDER = Path(__file__).parent
_MATRIX_TEMPLATE = ("bits", "group", "floats", "shared_bits", "shared_group", "shared_floats")
_MATRIX_INPUTS = ("weight", "scales", "biases", "shared_weight", "shared_scales", "shared_biases")
_POSITION = "thread_position_in_grid"
_LANE = "thread_index_in_simdgroup"

_ROUTE = MetalKernel(
    _FOLDER / "router.metal",
    "mlx_qwen::route",
    inputs=("logits",),
    outputs=("indices", "scores", "shared_score"),
    template=("T", "E", "k", "normalize"),
    arguments=("logits", "logits_strides", "indices", "scores", "shared_score", _POSITION, _LANE),
    row_contiguous=False,
)

_GATE_UP = MetalKernel(
    _FOLDER / "experts.metal",
    "mlx_qwen::expert_gate_up",
    inputs=("x", "indices", *_MATRIX_INPUTS),
    outputs=("hidden", "shared_hidden"),
    template=("T", *_MATRIX_TEMPLATE),
    arguments=(
        "x", "x_shape", "indices", "indices_shape",
        "weight", "weight_shape", "scales", "biases",
        "shared_weight", "shared_weight_shape", "shared_scales", "shared_biases",
        "hidden", "shared_hidden", _POSITION, _LANE,
    ),
)  # fmt: skip

_ROUTED_GATE_UP = MetalKernel(
    _FOLDER / "experts.metal",
    "mlx_qwen::routed_gate_up",
    inputs=("x", "logits", *_MATRIX_INPUTS),
    outputs=("hidden", "shared_hidden", "indices", "scores", "shared_score"),
    template=("T", "E", "k", "normalize", *_MATRIX_TEMPLATE),
    arguments=(
        "x", "x_shape", "logits",
        "weight", "weight_shape", "scales", "biases",
        "shared_weight", "shared_weight_shape", "shared_scales", "shared_biases",
        "hidden", "shared_hidden", "indices", "scores", "shared_score", _POSITION, _LANE,
    ),
)  # fmt: skip

_MLP_GATE_UP = MetalKernel(
    _FOLDER / "experts.metal",
    "mlx_qwen::mlp_gate_up",
    inputs=("x", "weight", "scales", "biases"),
    outputs=("hidden",),
    template=("T", "bits", "group", "floats"),
    arguments=("x", "x_shape", "weight", "weight_shape", "scales", "biases", "hidden", _POSITION, _LANE),
)

_DOWN_COMBINE = MetalKernel(
    _FOLDER / "experts.metal",
    "mlx_qwen::expert_down_combine",
    inputs=("hidden", "shared_hidden", "indices", "scores", "shared_score", *_MATRIX_INPUTS),
    outputs=("combined",),
    template=("T", "k", *_MATRIX_TEMPLATE),
    arguments=(
        "hidden", "hidden_shape", "shared_hidden", "shared_hidden_shape", "indices", "scores", "shared_score",
        "weight", "weight_shape", "scales", "biases", "shared_weight", "shared_scales", "shared_biases",
        "combined", "products_of_slots", _POSITION, _LANE,
    ),
    threadgroup_arrays=("float products_of_slots[4 * (k + 1)]",),
)  # fmt: skip

_SORT = MetalKernel(
    _FOLDER / "sort_by_expert.metal",
    "mlx_qwen::sort_by_expert",
    inputs=("indices",),
    outputs=("tokens", "experts", "places"),
    template=(),
    arguments=("indices", "indices_shape", "tokens", "experts", "places", _POSITION, _LANE),
)

_COMBINE = MetalKernel(
    _FOLDER / "combine.metal",
    "mlx_qwen::combine",
    inputs=("outputs", "places", "scores", "shared", "shared_score"),
    outputs=("combined",),
    template=("T", "k"),
    arguments=("outputs", "outputs_shape", "places", "scores", "shared", "shared_score", "combined", _POSITION),
)

_SWIGLU = MetalKernel(
    _FOLDER / "swiglu.metal",
    "mlx_qwen::swiglu_rows",
    inputs=("gate_up",),
    outputs=("hidden",),
    template=("T",),
    arguments=("gate_up", "gate_up_shape", "hidden", _POSITION),
)


def route(logits: mx.array, k: int, *, normalize: bool) -> Routing:
    """See `metal_kernels.moe_dispatch.route`."""
    N, columns = logits.shape
    indices, scores, shared_score = _ROUTE(
        [logits],
        [logits.dtype, columns - 1, k, normalize],
        grid=(32, N, 1),
        threadgroup=(32, min(N, 8), 1),
        output_shapes=[(N, k), (N, k), (N, 1)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32],
    )
    return Routing(indices, scores, shared_score)


def expert_gate_up(
    x: mx.array, indices: mx.array, gate_up: ExpertWeights, shared: ExpertWeights
) -> tuple[mx.array, mx.array]:
    """See `metal_kernels.moe_dispatch.expert_gate_up`."""
    N, k = indices.shape
    I, shared_I = gate_up.weight.shape[1] // 2, shared.weight.shape[0] // 2  # noqa: E741
    hidden, shared_hidden = _GATE_UP(
        [x, indices, *_arrays(gate_up), *_arrays(shared)],
        [x.dtype, *_packing(gate_up), *_packing(shared)],
        grid=(32 * N, math.ceil(max(I, shared_I) / 2), k + 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(N, k, I), (N, shared_I)],
        output_dtypes=[x.dtype, x.dtype],
    )
    return hidden, shared_hidden


def routed_gate_up(
    x: mx.array, logits: mx.array, k: int, gate_up: ExpertWeights, shared: ExpertWeights, *, normalize: bool
) -> tuple[mx.array, mx.array, Routing]:
    """See `metal_kernels.moe_dispatch.routed_gate_up`."""
    N, columns = logits.shape
    I, shared_I = gate_up.weight.shape[1] // 2, shared.weight.shape[0] // 2  # noqa: E741
    hidden, shared_hidden, *routing = _ROUTED_GATE_UP(
        [x, logits, *_arrays(gate_up), *_arrays(shared)],
        [x.dtype, columns - 1, k, normalize, *_packing(gate_up), *_packing(shared)],
        grid=(32 * N, math.ceil(max(I, shared_I) / 2), k + 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(N, k, I), (N, shared_I), (N, k), (N, k), (N, 1)],
        output_dtypes=[x.dtype, x.dtype, mx.uint32, mx.float32, mx.float32],
    )
    return hidden, shared_hidden, Routing(*routing)


def mlp_gate_up(x: mx.array, gate_up: ExpertWeights) -> mx.array:
    """See `metal_kernels.moe_dispatch.mlp_gate_up`."""
    rows, I = x.reshape(-1, x.shape[-1]), gate_up.weight.shape[0] // 2  # noqa: E741
    (hidden,) = _MLP_GATE_UP(
        [rows, *_arrays(gate_up)],
        [x.dtype, *_packing(gate_up)],
        grid=(32 * rows.shape[0], math.ceil(I / 2), 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(*x.shape[:-1], I)],
        output_dtypes=[x.dtype],
    )
    return hidden


def expert_down_combine(
    hidden: mx.array, shared_hidden: mx.array, routing: Routing, down: ExpertWeights, shared: ExpertWeights
) -> mx.array:
    """See `metal_kernels.moe_dispatch.expert_down_combine`."""
    N, k, _ = hidden.shape
    K = down.weight.shape[1]
    (combined,) = _DOWN_COMBINE(
        [hidden, shared_hidden, *routing, *_arrays(down), *_arrays(shared)],
        [hidden.dtype, k, *_packing(down), *_packing(shared)],
        grid=(32 * N, k + 1, math.ceil(K / 4)),
        threadgroup=(32, k + 1, 1),
        output_shapes=[(N, K)],
        output_dtypes=[hidden.dtype],
    )
    return combined


def sort_by_expert(indices: mx.array, num_experts: int) -> tuple[mx.array, mx.array, mx.array]:
    """See `metal_kernels.moe_dispatch.sort_by_expert`."""
    tokens, experts, places = _SORT(
        [indices],
        [],
        grid=(32, num_experts, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[(indices.size,)] * 3,
        output_dtypes=[mx.uint32] * 3,
    )
    return tokens, experts, places


def combine(outputs: mx.array, places: mx.array, routing: Routing, shared: mx.array) -> mx.array:
    """See `metal_kernels.moe_dispatch.combine`."""
    N, K = shared.shape
    (combined,) = _COMBINE(
        [outputs, places, routing.scores, shared, routing.shared_score],
        [shared.dtype, routing.scores.shape[1]],
        grid=(K // 4, N, 1),
        threadgroup=(min(K // 4, 256), 1, 1),
        output_shapes=[(N, K)],
        output_dtypes=[shared.dtype],
    )
    return combined


def swiglu(gate_up: mx.array) -> mx.array:
    """See `metal_kernels.moe_dispatch.swiglu`."""
    *rows, both = gate_up.shape
    I = both // 2  # noqa: E741
    (hidden,) = _SWIGLU(
        [gate_up.reshape(-1, both)],
        [gate_up.dtype],
        grid=(I // 4, math.prod(rows), 1),
        threadgroup=(min(I // 4, 256), 1, 1),
        output_shapes=[(math.prod(rows), I)],
        output_dtypes=[gate_up.dtype],
    )
    return hidden.reshape(*rows, I)


def _arrays(matrix: ExpertWeights) -> list[mx.array]:
    """Weight, scales and biases; a dense matrix stands in for those that it has not, which are not read."""
    held = (matrix.weight, matrix.scales, matrix.biases)
    return [matrix.weight if x is None else x for x in held]


def _packing(matrix: ExpertWeights) -> tuple[int, int, bool]:
    """Bits, group size and whether codes are floats, as the templates take them: 0 bits are a dense matrix."""
    return (0, 1, False) if matrix.scales is None else (matrix.bits, matrix.group_size, matrix.mode != "affine")
