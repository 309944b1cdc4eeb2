"""Grids, threadgroups, barriers, threadgroup memory and atomics."""

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_emulator.launch import Order
from tests.test_metal_emulator.kernels import ORDERS, floats, numbers, run


def test_positions_are_those_of_a_clipped_grid() -> None:
    (out,), _ = run(
        """
        uint3 p = thread_position_in_grid;
        device uint* o = out + ((p.z * 3 + p.y) * 10 + p.x) * 8;
        o[0] = thread_position_in_threadgroup.x + 100 * thread_position_in_threadgroup.y;
        o[1] = threadgroup_position_in_grid.x + 10 * threadgroup_position_in_grid.y;
        o[2] = threads_per_threadgroup.x * threads_per_threadgroup.y;
        o[3] = dispatch_threads_per_threadgroup.x * dispatch_threads_per_threadgroup.y;
        o[4] = thread_index_in_threadgroup;
        o[5] = threadgroups_per_grid.x + 10 * threadgroups_per_grid.y + 100 * threadgroups_per_grid.z;
        o[6] = threads_per_grid.x + grid_size.y;
        o[7] = simdgroups_per_threadgroup * 100 + thread_index_in_simdgroup + threads_per_simdgroup;
        """,
        {},
        {"out": ((2, 3, 10, 8), mx.uint32)},
        grid=(10, 3, 2),
        threadgroup=(4, 2, 1),
    )
    z, y, x = np.meshgrid(range(2), range(3), range(10), indexing="ij")
    width, height = np.where(x < 8, 4, 2), np.where(y < 2, 2, 1)
    index = x % 4 + y % 2 * width
    fields = [x % 4 + 100 * (y % 2), x // 4 + 10 * (y // 2), width * height, 8 + 0 * z, index, 223 + 0 * z]
    fields += [13 + 0 * z, 100 + index + 32]
    np.testing.assert_array_equal(np.array(out), np.stack(fields, -1))


@pytest.mark.parametrize("order", ORDERS)
def test_a_threadgroup_of_1024_sums_through_its_memory(order: Order) -> None:
    x = np.arange(3 * 1000, dtype=np.float32).reshape(3, 1000)
    (out,), report = run(
        """
        threadgroup float parts[32], total;
        uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
        float sum = simd_sum(x[thread_position_in_grid.y * 1000 + thread_position_in_grid.x]);
        if (lane == 0) parts[group] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (group == 0) {
          sum = simd_sum(lane < simdgroups_per_threadgroup ? parts[lane] : 0.0f);
          if (lane == 0) total = sum;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[thread_position_in_grid.y * 1000 + thread_position_in_grid.x] = total;
        """,
        {"x": mx.array(x)},
        {"out": ((3, 1000), mx.float32)},
        grid=(1000, 3, 1),
        threadgroup=(1000, 1, 1),
        order=order,
    )
    np.testing.assert_allclose(floats(out), np.repeat(x.sum(1, keepdims=True), 1000, 1), rtol=1e-6)
    assert report.count("tried") == 1


def test_helpers_in_the_header_take_threadgroup_pointers() -> None:
    (out,), _ = run(
        """
        threadgroup T tile[4][8];
        reverse_row<T>(x + thread_position_in_grid.y * 8, tile[thread_position_in_grid.y], thread_position_in_grid.x);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        out[thread_index_in_threadgroup] = tile[thread_position_in_grid.y][thread_position_in_grid.x];
        """,
        {"x": mx.arange(32)},
        {"out": ((4, 8), mx.int32)},
        grid=(8, 4, 1),
        threadgroup=(8, 4, 1),
        template=[("T", mx.int32)],
        header="""
        #include <metal_stdlib>
        using namespace metal;  // as a .metal file has it
        constant constexpr uint last = 7;
        template <typename T>
        METAL_FUNC void reverse_row(const device T* row, threadgroup T* tile, uint i) {
          tile[last - i] = row[i];
        }
        """,
    )
    np.testing.assert_array_equal(np.array(out), np.arange(32).reshape(4, 8)[:, ::-1])


@pytest.mark.parametrize("order", ORDERS)
def test_atomics_of_all_threads_add_up(order: Order) -> None:
    (out,), _ = run(
        """
        atomic_fetch_add_explicit(&out[0], thread_position_in_grid.x, memory_order_relaxed);
        atomic_fetch_max_explicit(&out[1], thread_position_in_grid.x, memory_order_relaxed);
        uint expected = atomic_load_explicit(&out[2], memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(&out[2], &expected, expected + 2, memory_order_relaxed,
                                                      memory_order_relaxed)) {}
        """,
        {},
        {"out": ((3,), mx.uint32)},
        grid=(100, 1, 1),
        init_value=0,
        atomic_outputs=True,
        order=order,
    )
    assert out.tolist() == [4950, 99, 200]


def test_an_atomic_counter_in_threadgroup_memory_hands_out_places() -> None:
    (out,), _ = run(
        """
        threadgroup atomic_uint next;
        if (thread_index_in_threadgroup == 0) atomic_store_explicit(&next, 0, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        uint place = atomic_fetch_add_explicit(&next, 1, memory_order_relaxed);
        out[place] = thread_index_in_threadgroup;
        """,
        {},
        {"out": ((48,), mx.uint32)},
        grid=(48, 1, 1),
        threadgroup=(48, 1, 1),
        order="random",
    )
    assert sorted(numbers(out)) == list(range(48)) != numbers(out)


def test_an_order_changes_which_thread_comes_first() -> None:
    firsts = set()
    for order in ORDERS:
        (out,), _ = run(
            "uint old = atomic_fetch_add_explicit(&out[0], 1, memory_order_relaxed);"
            "if (old == 0) atomic_store_explicit(&out[1], thread_position_in_grid.x, memory_order_relaxed);",
            {},
            {"out": ((2,), mx.uint32)},
            grid=(96, 1, 1),
            init_value=0,
            atomic_outputs=True,
            order=order,
            checked=False,
        )
        firsts.add(numbers(out)[1])
    assert {0, 95} < firsts
