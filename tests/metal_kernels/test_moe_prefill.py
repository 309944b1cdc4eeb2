"""Many rows: pairs sorted by expert, MLX's gathered matmul, and a combination that puts the rows back."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.moe_dispatch import combine, reference, sort_by_expert, sparse_mlp, swiglu
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.moe_layers import (
    DENSE,
    as_numpy,
    edited_kernels,
    exact_sparse_mlp,
    normal,
    random_routing,
    relative_error,
    sparse_weights,
)

ORDERS = ("forward", "reverse", "random")


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def check_sort(indices, num_experts):
    pairs = np.array(indices).reshape(-1)
    order = np.argsort(pairs, kind="stable")
    tokens, experts, places = (np.array(x) for x in sort_by_expert(indices, num_experts))
    assert np.array_equal(tokens, order // indices.shape[1])
    assert np.array_equal(experts, pairs[order])
    assert np.array_equal(places[order], np.arange(len(pairs)))


@pytest.mark.parametrize(("N", "k", "E"), [(1, 2, 5), (17, 3, 5), (32, 8, 256), (101, 10, 40)])
def test_pairs_are_sorted_by_expert_and_stay_in_order(N, k, E):
    with emulated():
        check_sort(random_routing(N, k, E).indices, E)


@pytest.mark.parametrize("order", ORDERS)
def test_experts_that_nobody_chose_leave_no_gap(order):
    only_last = mx.full((20, 2), 8, dtype=mx.uint32)
    with emulated(checked=True, order=order):
        check_sort(only_last, 9)
        check_sort(mx.where(mx.arange(20)[:, None] % 3 == 0, mx.array(2, mx.uint32), only_last), 9)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_combination_takes_rows_from_where_the_sort_put_them(order, dtype):
    routing = random_routing(18, 3, 5)
    outputs, shared = normal(54, 12, dtype=dtype), normal(18, 12, dtype=dtype, seed=1)
    with emulated(checked=True, order=order):
        *_, places = sort_by_expert(routing.indices, 5)
        found = combine(outputs, places, routing, shared)
    rows = as_numpy(outputs)[np.array(places)].reshape(18, 3, 12)
    expected = (rows * as_numpy(routing.scores)[..., None]).sum(1) + as_numpy(routing.shared_score) * as_numpy(shared)
    assert found.dtype == dtype
    assert np.allclose(as_numpy(found), expected, rtol=2**-8 if dtype == mx.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_activation_is_rounded_once(dtype, order):
    gate_up = 10 * normal(2, 3, 24, dtype=dtype)
    with emulated(checked=True, order=order):
        found = swiglu(gate_up)
    gate, up = np.split(as_numpy(gate_up), 2, axis=-1)
    unit = {mx.float32: 1e-6, mx.bfloat16: 2**-8, mx.float16: 2**-11}[dtype]
    assert (found.shape, found.dtype) == ((2, 3, 12), dtype)
    assert np.allclose(as_numpy(found), gate / (1 + np.exp(-gate)) * up, rtol=1.01 * unit, atol=1e-6)


@pytest.mark.parametrize(("packing", "shared"), [((4, 32), (8, 64)), (DENSE, (4, 32))], ids=str)
def test_experts_of_many_rows_equal_exact_arithmetic(packing, shared):
    weights = sparse_weights(packing=packing, shared=shared)
    x, routing = normal(40, 128), random_routing(40, 3, 5)
    with emulated() as report:
        found = sparse_mlp(x, routing, weights)
    expected = exact_sparse_mlp(x, routing, weights)
    assert relative_error(found, expected) < 2e-6
    assert relative_error(reference.sparse_mlp(x, routing, weights), expected) < 2e-6
    assert [launch.kernel.removeprefix("mlx_qwen_") for launch in report.launches] == [
        "sort_by_expert", "swiglu_rows", "swiglu_rows", "combine"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("N", "K", "because"),
    [(18, 10, "10 columns, not a multiple of 4"), (1, 4, "fewer than 8 elements")],
    ids=["ten columns", "one short row"],
)
def test_a_combination_that_the_kernel_does_not_take_is_counted(N, K, because):
    routing, places = random_routing(N, 2, 5), mx.arange(2 * N, dtype=mx.uint32)
    outputs, shared = normal(2 * N, K), normal(N, K, seed=1)
    with emulated() as report:
        combined = combine(outputs, places, routing, shared)
    assert mx.array_equal(combined, reference.combine(outputs, places, routing, shared))
    assert (report.count(), stats()) == (0, {"combine": OpStats(reference={because: 1})})


def test_an_activation_of_six_columns_is_counted_and_right():
    with emulated() as report:
        assert mx.array_equal(swiglu(normal(3, 12)), reference.swiglu(normal(3, 12)))
    assert (report.count(), stats()) == (0, {"swiglu": OpStats(reference={"6 columns, not a multiple of 4": 1})})


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("indices[pair] < expert;", "indices[pair] <= expert;", "double write"),
        ("pair < pairs && indices[pair]", "indices[pair]", "out of bounds"),
        ("place += metal::simd_sum(is_own);", "place += metal::simd_max(is_own);", "double write"),
    ],
    ids=["places one expert further", "pairs past the end", "places counted wrong"],
)
def test_a_broken_sort_is_caught(monkeypatch, sound, broken, kind):
    with (
        edited_kernels(monkeypatch, sound, broken),
        emulated(checked=True),
        pytest.raises(KernelError) as caught,
    ):
        sort_by_expert(random_routing(33, 3, 5).indices, 5)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("const ulong column = 4 * position.x;", "const ulong column = 4 * position.x + 1;", "out of bounds"),
        ("const ulong column = 4 * position.x;", "const ulong column = 4 * position.x + 4;", "out of bounds"),
    ],
    ids=["one column further", "four columns further"],
)
def test_a_broken_combination_or_activation_is_caught(monkeypatch, sound, broken, kind):
    routing, places = random_routing(18, 2, 5), mx.arange(36, dtype=mx.uint32)
    with edited_kernels(monkeypatch, sound, broken), emulated(checked=True):
        with pytest.raises(KernelError, match=kind):
            combine(normal(36, 8), places, routing, normal(18, 8))
        with pytest.raises(KernelError, match=kind):
            swiglu(normal(3, 16))
