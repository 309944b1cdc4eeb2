"""Launches that join two: routing with the experts' gate and up, and a dense MLP's product with its activation."""

import mlx.core as mx
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels._choices import Choices, chosen
from metal_kernels.moe_dispatch import mlp_gate_up, reference, route, routed_mlp, sparse_mlp, swiglu
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.moe_layers import (
    DENSE,
    as_numpy,
    dense,
    edited_kernels,
    exact_activation,
    matrix,
    normal,
    relative_error,
    sparse_weights,
)

ORDERS = ("forward", "reverse", "random")


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


@pytest.mark.parametrize(("N", "E", "k", "normalize"), [(1, 40, 3, True), (3, 5, 5, False), (2, 33, 1, True)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_routing_on_the_way_gives_the_bits_of_routing_before(
    N: int, E: int, k: int, normalize: bool, dtype: mx.Dtype
) -> None:
    weights = sparse_weights(E, 64, 32, 64, packing=(4, 32), shared=(8, 32), dtype=dtype)
    # Rounded, so that experts tie.
    x, logits = normal(N, 64, dtype=dtype), mx.round(2 * normal(N, E + 1, seed=1)).astype(dtype)
    with emulated() as report:
        found = routed_mlp(x, logits, k, weights, normalize=normalize)
        assert [each.kernel for each in report.launches] == ["mlx_qwen_routed_gate_up", "mlx_qwen_expert_down_combine"]
        assert stats() == {name: OpStats(kernel=1) for name in ("routed_gate_up", "expert_down_combine")}
        assert mx.array_equal(found, sparse_mlp(x, route(logits, k, normalize=normalize), weights))


def test_every_order_of_threads_routes_and_multiplies_alike() -> None:
    weights, x, logits = sparse_weights(5, 64, 32, 64), normal(2, 64), normal(2, 6, seed=1)
    found = []
    for order in ORDERS:
        with emulated(checked=True, order=order):
            found.append(routed_mlp(x, logits, 2, weights))
    assert mx.array_equal(found[0], found[1]) and mx.array_equal(found[0], found[2])


def test_more_rows_are_routed_first() -> None:
    weights, x, logits = sparse_weights(5, 64, 32, 64), normal(17, 64), normal(17, 6, seed=1)
    with emulated() as report:
        found = routed_mlp(x, logits, 2, weights)
        assert report.count("mlx_qwen_route") == 1 and not report.count("mlx_qwen_routed_gate_up")
        assert mx.array_equal(found, sparse_mlp(x, route(logits, 2), weights))


def test_what_has_no_kernel_is_counted_and_right() -> None:
    weights, x = sparse_weights(5, 64, 32, 64), normal(2, 64)
    logits = normal(2, 6, seed=1)
    parts = (matrix(64, 64, seed=3), matrix(64, 64, packing=(4, 32), seed=4))
    weights = weights._replace(shared_gate_up=parts)
    with emulated():
        found = routed_mlp(x, logits, 2, weights)
    assert stats()["routed_gate_up"] == OpStats(reference={"shared gate and up of different precision": 1})
    expected = reference.sparse_mlp(x, reference.route(logits, 2, normalize=True), weights)
    assert relative_error(found, as_numpy(expected)) < 4e-6


def test_an_impossible_number_of_experts_is_refused() -> None:
    with emulated(), pytest.raises(ValueError, match="k is 6, expected 1 to 5"):
        routed_mlp(normal(1, 64), normal(1, 6), 6, sparse_weights(5, 64, 32, 64))


@pytest.mark.parametrize("packing", [(4, 64), (6, 32), (8, 128), DENSE], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_a_dense_mlp_is_one_launch_up_to_its_activation(packing: tuple[int, int], dtype: mx.Dtype) -> None:
    gate_up, x = matrix(2 * 37, 384, packing=packing, dtype=dtype), normal(1, 3, 384, dtype=dtype)
    with emulated(checked=True) as report:
        found = mlp_gate_up(x, gate_up)
    assert [each.kernel for each in report.launches] == ["mlx_qwen_mlp_gate_up"]
    assert (found.shape, found.dtype) == ((1, 3, 37), dtype)
    expected = exact_activation(as_numpy(x), dense(gate_up))
    assert relative_error(found, expected) < (2e-6 if dtype == mx.float32 else 2**-8)
    moved = report.launches[0].buffers["weight"]
    assert moved.unique_read == -(-moved.size // 64) * 64


@pytest.mark.parametrize(("rows", "limit"), [(5, 4), (1, 0)])
def test_more_rows_than_were_chosen_are_mlx_own_product(rows: int, limit: int) -> None:
    gate_up, x = matrix(64, 64, packing=(4, 32)), normal(rows, 64)
    with emulated() as report, chosen(Choices(mlp_rows=limit)):
        found = mlp_gate_up(x, gate_up)
        assert report.count("mlx_qwen_swiglu_rows") == report.count() == 1
        assert mx.array_equal(found, swiglu(reference.matmul(x, gate_up)))


def test_gate_and_up_of_two_precisions_are_two_products() -> None:
    parts, x = (matrix(32, 64, packing=(4, 32)), matrix(32, 64, packing=(8, 32))), normal(1, 64)
    with emulated() as report:
        assert mx.array_equal(mlp_gate_up(x, *parts), swiglu(reference.matmul(x, *parts)))
    assert "mlp_gate_up" not in stats() and report.count("mlx_qwen_swiglu_rows") == 2  # of either side


def test_a_broken_kernel_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    call = "write_choice<E, k, normalize>(logits + token * (E + {})"
    weights = sparse_weights(5, 64, 32, 64)
    with (
        edited_kernels(monkeypatch, call.format(1), call.format(2)),
        emulated(checked=True),
        pytest.raises(KernelError) as caught,
    ):
        routed_mlp(normal(2, 64), normal(2, 6, seed=1), 2, weights)
    assert caught.value.kind == "out of bounds"
