"""Experts of a few rows: gate and up with the activation, then down with the combination, one launch each."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, reset_stats, stats
from metal_kernels.moe_dispatch import ExpertWeights, expert_down_combine, expert_gate_up, reference, sparse_mlp
from tests.metal_emulator import KernelError, emulated
from tests.metal_kernels.moe_layers import (
    DENSE,
    as_numpy,
    edited_kernels,
    exact_combination,
    exact_hidden,
    exact_sparse_mlp,
    matrix,
    normal,
    random_routing,
    relative_error,
    sparse_weights,
)

ORDERS = ("forward", "reverse", "random")
LAUNCHES = ["mlx_qwen_expert_gate_up", "mlx_qwen_expert_down_combine"]


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


@pytest.mark.parametrize(
    ("packing", "shared"),
    [
        ((4, 32), (8, 64)),
        ((4, 64), (4, 64)),
        ((4, 128), DENSE),
        ((8, 32), (4, 128)),
        ((8, 128), (8, 32)),
        (DENSE, DENSE),
    ],
    ids=str,
)
def test_experts_of_every_packing_equal_exact_arithmetic(packing, shared):
    weights = sparse_weights(K=384, I=128, shared_I=128, packing=packing, shared=shared)
    x, routing = normal(3, 384), random_routing(3, 2, 5)
    with emulated() as report:
        found = sparse_mlp(x, routing, weights)
    assert [launch.kernel for launch in report.launches] == LAUNCHES
    assert relative_error(found, exact_sparse_mlp(x, routing, weights)) < 2e-6
    assert relative_error(reference.sparse_mlp(x, routing, weights), exact_sparse_mlp(x, routing, weights)) < 2e-6


@pytest.mark.parametrize(("N", "k"), [(1, 1), (1, 3), (2, 5), (16, 2)])
def test_any_few_rows_and_any_number_of_experts_a_row_are_taken(N, k):
    weights = sparse_weights(shared_I=192)
    x, routing = normal(N, 128), random_routing(N, k, 5)
    with emulated():
        assert relative_error(sparse_mlp(x, routing, weights), exact_sparse_mlp(x, routing, weights)) < 2e-6


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("packing", [(4, 64), DENSE], ids=str)
def test_short_types_are_rounded_once_after_the_activation_and_once_at_the_end(dtype, packing):
    weights = sparse_weights(packing=packing, shared=packing, dtype=dtype)
    x, routing = normal(3, 128, dtype=dtype), random_routing(3, 2, 5)
    with emulated():
        hidden, shared_hidden = expert_gate_up(x, routing.indices, weights)
        found = expert_down_combine(hidden, shared_hidden, routing, weights)
    unit = 2**-8 if dtype == mx.bfloat16 else 2**-11
    exact, exact_shared = exact_hidden(x, routing.indices, weights)
    for rounded, expected in ((hidden, exact), (shared_hidden, exact_shared)):
        assert rounded.dtype == dtype
        assert np.allclose(as_numpy(rounded), expected, rtol=1.01 * unit, atol=1e-6)
    combined = exact_combination(as_numpy(hidden), as_numpy(shared_hidden), routing, weights)
    assert found.dtype == dtype
    assert np.allclose(as_numpy(found), combined, rtol=1.01 * unit, atol=1e-6)


def test_a_layer_of_the_released_size_equals_exact_arithmetic():
    weights = sparse_weights(E=4, K=2048, I=512, shared_I=512, packing=(4, 64), shared=(4, 64))
    x, routing = normal(1, 2048), random_routing(1, 3, 4)
    with emulated():
        assert relative_error(sparse_mlp(x, routing, weights), exact_sparse_mlp(x, routing, weights)) < 2e-6


@pytest.mark.parametrize("sizes", [{"I": 37, "shared_I": 21}, {"K": 24, "I": 8}], ids=str)
def test_sizes_that_fill_no_simd_group_are_taken(sizes):
    weights = sparse_weights(**sizes)
    x, routing = normal(2, weights.down.weight.shape[1]), random_routing(2, 2, 5)
    with emulated(checked=True):
        found = expert_gate_up(x, routing.indices, weights)
    for hidden, expected in zip(found, exact_hidden(x, routing.indices, weights), strict=True):
        assert relative_error(hidden, expected) < 2e-6


def test_outputs_that_are_no_multiple_of_four_are_taken():
    weights = sparse_weights()._replace(down=matrix(5, 30, 64), shared_down=matrix(30, 64, seed=1))
    hidden, shared_hidden, routing = normal(2, 3, 64), normal(2, 64, seed=1), random_routing(2, 3, 5)
    with emulated(checked=True):
        found = expert_down_combine(hidden, shared_hidden, routing, weights)
    expected = exact_combination(as_numpy(hidden), as_numpy(shared_hidden), routing, weights)
    assert relative_error(found, expected) < 2e-6


def test_every_order_of_threads_gives_the_same_bits():
    weights = sparse_weights(packing=(4, 32), shared=(8, 64))
    x, routing = normal(2, 128), random_routing(2, 3, 5)
    found = []
    for order in ORDERS:
        with emulated(checked=True, order=order):
            found.append(sparse_mlp(x, routing, weights))
    assert mx.array_equal(found[0], found[1])
    assert mx.array_equal(found[0], found[2])


def test_only_the_chosen_experts_are_read_and_each_byte_of_them_once():
    E, K, I, k = 6, 512, 128, 2  # noqa: E741
    weights = sparse_weights(E, K, I, I, packing=(4, 64), shared=(8, 64), dtype=mx.bfloat16)
    with emulated(checked=True) as report:
        sparse_mlp(normal(1, K, dtype=mx.bfloat16), random_routing(1, k, E), weights)
    for launch in report.launches:
        routed = [launch.buffers[name] for name in ("weight", "scales", "biases")]
        others = [buffer for name, buffer in launch.buffers.items() if name not in ("weight", "scales", "biases")]
        needed = sum(buffer.size for buffer in routed) * k / E + sum(buffer.size for buffer in others)
        moved = sum(buffer.unique_read + buffer.unique_written for buffer in launch.buffers.values())
        assert moved < 1.05 * needed
        assert launch.buffers["weight"].read == launch.buffers["weight"].unique_read


def test_rows_with_the_same_expert_share_its_weights():
    weights = sparse_weights(packing=(8, 32), shared=(8, 32))
    routing = random_routing(1, 2, 5)
    alone, twice = normal(1, 128), normal(1, 128, seed=1)
    together = type(routing)(*(mx.concatenate([part, part]) for part in routing))
    with emulated():
        found = sparse_mlp(mx.concatenate([alone, twice]), together, weights)
        assert mx.array_equal(found[:1], sparse_mlp(alone, routing, weights))
        assert mx.array_equal(found[1:], sparse_mlp(twice, routing, weights))


def packed(shape, group, bits, mode="affine"):
    return ExpertWeights(*mx.quantize(normal(*shape), group, bits, mode), group_size=group, bits=bits, mode=mode)


FALL_BACKS = {
    "one bit": (6, {"gate_up": packed((5, 128, 128), 64, 1)}, "1 bits affine in groups of 64"),
    "half a shared expert": (2, {"shared_gate_up": (matrix(64, 128), matrix(64, 128, packing=(4, 32)))},
                             "shared gate and up of different precision"),
    "another dtype": (2, {"shared_gate_up": (matrix(128, 128, dtype=mx.bfloat16),)},
                      "activations of mlx.core.float32 and weights of mlx.core.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize(("N", "replaced", "because"), FALL_BACKS.values(), ids=FALL_BACKS)
def test_what_the_kernels_do_not_take_is_counted_and_right(N, replaced, because):
    weights = sparse_weights()._replace(**replaced)
    x, routing = normal(N, 128), random_routing(N, 2, 5)
    with emulated() as report:
        found = sparse_mlp(x, routing, weights)
    assert relative_error(found, exact_sparse_mlp(x, routing, weights)) < 2e-6
    assert report.count("mlx_qwen_expert_gate_up") == 0
    assert stats()["expert_gate_up"] == OpStats(reference={because: 1})
    assert stats()["expert_down_combine"] == OpStats(kernel=1)


def test_more_rows_than_any_machine_chooses_are_too_many_for_a_launch_of_single_products():
    weights, routing = sparse_weights(), random_routing(129, 2, 5)
    with emulated() as report:
        expert_gate_up(normal(129, 128), routing.indices, weights)
    assert report.count() == 0
    assert stats() == {"expert_gate_up": OpStats(reference={"more than 128 rows or 16 experts a row": 1})}


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", "", "uninitialised read"),
        ("for (uint s = 0; s < k; ++s) total", "for (uint s = 0; s <= k; ++s) total", "out of bounds"),
        ("if (first >= I) return;", "", "double write"),
    ],
    ids=["missing barrier", "one slot too many", "outputs past the end"],
)
def test_a_broken_kernel_is_caught(monkeypatch, sound, broken, kind):
    weights, routing = sparse_weights(I=64, shared_I=128), random_routing(1, 2, 5)
    with (
        edited_kernels(monkeypatch, sound, broken),
        emulated(checked=True),
        pytest.raises(KernelError) as caught,
    ):
        sparse_mlp(normal(1, 128), routing, weights)
    assert caught.value.kind == kind
