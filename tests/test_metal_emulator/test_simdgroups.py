"""SIMD groups: reductions, shuffles, scans, votes and matrices over 32 lanes."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_emulator.launch import Order
from tests.test_metal_emulator.kernels import ORDERS, floats, run

Values = np.ndarray[tuple[int, ...], np.dtype[np.floating[Any]]]
LANES = np.arange(32)


@pytest.mark.parametrize("order", ORDERS)
def test_every_lane_gets_the_value_numpy_gives(order: Order) -> None:
    functions: dict[str, Callable[[Values], Values]] = {
        "simd_sum(x)": lambda v: np.full(32, v.sum()),
        "simd_max(x)": lambda v: np.full(32, v.max()),
        "simd_min(x)": lambda v: np.full(32, v.min()),
        "simd_shuffle(x, lane ^ 5)": lambda v: v[LANES ^ 5],
        "simd_shuffle_xor(x, 16)": lambda v: v[LANES ^ 16],
        "simd_shuffle_down(x, 3)": lambda v: np.concatenate([v[3:], v[-3:]]),
        "simd_shuffle_up(x, 2)": lambda v: np.concatenate([v[:2], v[:-2]]),
        "simd_shuffle_rotate_down(x, 7)": lambda v: np.roll(v, -7),
        "simd_shuffle_and_fill_down(x, -x, 4)": lambda v: np.concatenate([v[4:], -v[:4]]),
        "simd_shuffle_and_fill_up(x, -x, 4)": lambda v: np.concatenate([-v[-4:], v[:-4]]),
        "simd_broadcast(x, 9)": lambda v: np.full(32, v[9]),
        "simd_broadcast_first(x)": lambda v: np.full(32, v[0]),
        "simd_prefix_inclusive_sum(x)": np.cumsum,
        "simd_prefix_exclusive_sum(x)": lambda v: np.cumsum(v) - v,
        "quad_sum(x)": lambda v: np.repeat(v.reshape(8, 4).sum(1), 4),
        "quad_max(x)": lambda v: np.repeat(v.reshape(8, 4).max(1), 4),
        "simd_any(x == 31)": lambda _: np.ones(32),
        "simd_all(x == 31)": lambda _: np.zeros(32),
        "uint(ulong(simd_ballot(lane < 5)))": lambda _: np.full(32, 31),
    }
    lines = [f"out[{k} * 64 + i] = {call};" for k, call in enumerate(functions)]
    values = np.random.default_rng(0).permutation(64).astype(np.float32)
    (out,), _ = run(
        "uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup; float x = values[i];\n"
        + "\n".join(lines),
        {"values": mx.array(values)},
        {"out": ((len(functions), 64), mx.float32)},
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        order=order,
    )
    for row, (call, function) in zip(floats(out), functions.items(), strict=True):
        halves = [function(half) for half in values.reshape(2, 32)]
        if "31" in call:
            halves = [
                np.full(32, float({"any": np.any, "all": np.all}[call[5:8]](half == 31)))
                for half in np.split(values, 2)
            ]
        np.testing.assert_array_equal(row, np.concatenate(halves), err_msg=call)


def test_a_sum_adds_neighbours_first_and_rounds_each_time() -> None:
    values = mx.random.normal((32,), key=mx.random.key(3)).astype(mx.bfloat16)
    (out,), _ = run(
        "out[thread_index_in_simdgroup] = simd_sum(x[thread_index_in_simdgroup]);",
        {"x": values},
        {"out": ((32,), mx.bfloat16)},
    )
    while values.size > 1:
        values = values[0::2] + values[1::2]
    assert mx.array_equal(out, mx.broadcast_to(values, (32,)))


def test_a_clipped_group_reduces_over_the_lanes_it_has() -> None:
    (out,), _ = run(
        "uint i = thread_position_in_grid.x; out[i] = simd_sum(x[i]);",
        {"x": mx.arange(45).astype(mx.float32)},
        {"out": ((45,), mx.float32)},
        grid=(45, 1, 1),
    )
    assert out.tolist() == [sum(range(32))] * 32 + [sum(range(32, 45))] * 13


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_matrix_product_agrees_with_numpy(dtype: mx.Dtype) -> None:
    mx.random.seed(5)
    a, b = (mx.random.randint(-4, 5, (8, 16)).astype(dtype) for _ in range(2))
    c = mx.random.randint(-4, 5, (8, 8)).astype(mx.float32)
    (out,), _ = run(
        """
        simdgroup_matrix<T, 8, 8> left, right;
        simdgroup_matrix<float, 8, 8> sum;
        simdgroup_load(sum, c);
        for (int k = 0; k < 16; k += 8) {
          simdgroup_load(left, a + k, 16);
          simdgroup_load(right, b, 16, ulong2(k, 0), true);
          simdgroup_multiply_accumulate(sum, left, right, sum);
        }
        simdgroup_store(sum, out, 8);
        """,
        {"a": a, "b": b, "c": c},
        {"out": ((8, 8), mx.float32)},
        template=[("T", dtype)],
    )
    np.testing.assert_array_equal(floats(out), floats(a) @ floats(b).T + floats(c))


def test_each_lane_holds_two_neighbours_of_a_matrix_row() -> None:
    (out, unit), _ = run(
        """
        simdgroup_float8x8 m;
        simdgroup_load(m, a, 8);
        uint lane = thread_index_in_simdgroup;
        out[2 * lane] = m.thread_elements()[0];
        out[2 * lane + 1] = m.thread_elements()[1];
        simdgroup_store(simdgroup_float8x8(1.0f), unit, 8);
        """,
        {"a": mx.arange(64).astype(mx.float32)},
        {"out": ((32, 2), mx.float32), "unit": ((8, 8), mx.float32)},
    )
    rows = (LANES // 16) * 4 + LANES // 2 % 4
    columns = LANES // 4 % 4 // 2 * 4 + LANES % 2 * 2
    np.testing.assert_array_equal(floats(out)[:, 0], rows * 8 + columns)
    np.testing.assert_array_equal(floats(out)[:, 1], rows * 8 + columns + 1)
    np.testing.assert_array_equal(floats(unit), np.eye(8))
