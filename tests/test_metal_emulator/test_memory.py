"""Arrays reach kernels and come back as MLX passes them."""

import mlx.core as mx
import numpy as np
import pytest

from tests.metal_emulator.signature import METAL_TYPES
from tests.test_metal_emulator.kernels import run

COPY = "uint i = thread_position_in_grid.x; out[i] = x[i];"
REAL_TYPES = [dtype for dtype in METAL_TYPES if dtype != mx.complex64]


@pytest.mark.parametrize("dtype", [mx.bool_, mx.uint8, mx.int64, mx.float16, mx.bfloat16, mx.complex64], ids=str)
def test_every_width_of_element_passes_through(dtype: mx.Dtype) -> None:
    x = (mx.arange(40) % 3).astype(dtype)
    (out,), _ = run(COPY, {"x": x}, {"out": ((40,), dtype)}, grid=(40, 1, 1), checked=False)
    assert out.dtype == dtype
    assert mx.array_equal(out, x)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_strides_of_a_view_are_those_of_its_memory(dtype: mx.Dtype) -> None:
    base = mx.arange(6 * 20).astype(dtype).reshape(6, 20)
    view = base[1:5, 3:19:2].transpose(1, 0)
    (out, seen), report = run(
        """
        uint i = thread_position_in_grid.x, j = thread_position_in_grid.y;
        out[i * x_shape[1] + j] = x[i * x_strides[0] + j * x_strides[1]];
        if (i + j == 0) { seen[0] = x_strides[0]; seen[1] = x_strides[1]; seen[2] = x_ndim; }
        """,
        {"x": view},
        {"out": (view.shape, dtype), "seen": ((3,), mx.int32)},
        grid=(8, 4, 1),
        contiguous=False,
    )
    assert seen.tolist() == [2, 20, 2]
    assert report.launches[0].copied_inputs == ()
    assert mx.array_equal(out, view)


def test_a_view_becomes_contiguous_when_asked() -> None:
    view = mx.arange(120).reshape(6, 20)[:, 3:7].transpose(1, 0)
    (out, strides), report = run(
        COPY + " if (i == 0) { strides[0] = x_strides[0]; strides[1] = x_strides[1]; }",
        {"x": view},
        {"out": (view.shape, mx.int32), "strides": ((2,), mx.int64)},
        grid=(24, 1, 1),
    )
    assert strides.tolist() == [6, 1]
    assert report.launches[0].copied_inputs == ("x",)
    assert mx.array_equal(out, view)


def test_a_broadcast_input_has_stride_zero() -> None:
    (out,), _ = run(
        "uint i = thread_position_in_grid.x; out[i] = x[i / 4 * x_strides[0] + i % 4 * x_strides[1]];",
        {"x": mx.broadcast_to(mx.arange(8.0).reshape(2, 4)[:, :1], (2, 4))},
        {"out": ((8,), mx.float32)},
        grid=(8, 1, 1),
        contiguous=False,
    )
    assert out.tolist() == [0, 0, 0, 0, 4, 4, 4, 4]


def test_numbers_and_small_arrays_are_inputs_too() -> None:
    with_numbers = "out[0] = n * scale + small[2];"
    (out,), _ = run(
        with_numbers,
        {"n": mx.array(3), "scale": mx.array(0.5), "small": mx.array([1.0, 2.0, 4.0])},
        {"out": ((1,), mx.float32)},
        grid=(1, 1, 1),
    )
    assert out.item() == 5.5


def test_an_output_without_threads_keeps_its_initial_value() -> None:
    (out,), _ = run(
        "if (thread_position_in_grid.x < 3) out[thread_position_in_grid.x] = 1;",
        {},
        {"out": ((5,), mx.bfloat16)},
        grid=(5, 1, 1),
        init_value=0.25,
    )
    assert out.tolist() == [1, 1, 1, 0.25, 0.25]


def test_an_output_nobody_writes_is_poisoned() -> None:
    (out,), _ = run("", {}, {"out": ((4,), mx.float32)}, grid=(1, 1, 1), checked=False)
    assert np.isnan(np.array(out)).all()


def test_vector_loads_see_the_alignment_the_gpu_would() -> None:
    base = mx.arange(64).astype(mx.float32)
    body = "out[thread_position_in_grid.x] = ((const device float4*)x)[thread_position_in_grid.x].w;"
    (out,), _ = run(body, {"x": base[16:48]}, {"out": ((8,), mx.float32)}, grid=(8, 1, 1), contiguous=False)
    assert out.tolist() == [19, 23, 27, 31, 35, 39, 43, 47]


def test_a_local_array_nobody_set_holds_no_numbers() -> None:
    (out,), _ = run(
        "float v[4]; uint i = thread_position_in_grid.x; v[i % 2] = 1; out[i] = v[i % 4];",
        {},
        {"out": ((8,), mx.float32)},
        grid=(8, 1, 1),
    )
    assert np.isnan(np.array(out)).tolist() == [False, False, True, True] * 2
