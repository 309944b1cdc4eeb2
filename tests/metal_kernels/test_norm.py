"""RMS norm and residual addition, through the emulator, beside their reference."""

import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import OpStats, _build, reset_stats, stats
from metal_kernels.norm import add_rms_norm, reference, rms_norm
from tests.metal_emulator import KernelError, emulated

EPS = 1e-6
# One unit in the last place of the two short types; in fp32, what the reference's own sum is off on a CPU.
TOLERANCE = {mx.float32: 2e-6, mx.bfloat16: 2**-7, mx.float16: 2**-10}


@pytest.fixture(autouse=True)
def _metal_backend(monkeypatch):
    monkeypatch.setenv("MLX_QWEN_KERNELS", "metal")
    reset_stats()


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def assert_close(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    difference = mx.abs(found.astype(mx.float32) - expected.astype(mx.float32))
    assert mx.all(difference <= TOLERANCE[expected.dtype] * mx.abs(expected.astype(mx.float32))).item()


def check_add_rms_norm(x, branch, weight):
    total, normed = add_rms_norm(x, branch, weight, EPS)
    expected_total, expected = reference.add_rms_norm(x, branch, weight, EPS)
    assert mx.array_equal(total, expected_total)
    assert_close(normed, expected)


@pytest.mark.parametrize("D", [8, 12, 100, 132, 1024, 2048, 5120, 8192])
def test_a_row_of_any_width_is_normed(D):
    x, weight = normal(2, 3, D), normal(D, seed=1)
    with emulated() as report:
        assert_close(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS, x.dtype))
        check_add_rms_norm(x, normal(2, 3, D, seed=2), weight)
    assert report.count() == 2
    assert stats() == {"rms_norm": OpStats(kernel=1), "add_rms_norm": OpStats(kernel=1)}


@pytest.mark.parametrize("D", [132, 8192])
def test_the_kernel_is_nearly_exact_in_fp32(D):
    x, weight = normal(3, D), normal(D, seed=1)
    with emulated():
        normed = np.array(rms_norm(x, weight, EPS))
    exact = np.array(x).astype(np.float64)
    exact *= np.array(weight) / np.sqrt((exact**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(normed, exact, rtol=4e-7)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_short_types_are_rounded_once(dtype):
    x, weight = normal(3, 1024, dtype=dtype), normal(1024, seed=1)
    with emulated():
        assert_close(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS, x.dtype))
        check_add_rms_norm(x, normal(3, 1024, dtype=dtype, seed=2), weight)


@pytest.mark.parametrize("stream", [mx.float32, mx.bfloat16], ids=str)
def test_the_stream_stays_fp32_and_its_norm_takes_the_branchs_type(stream):
    x, branch = normal(2, 1024, dtype=stream), normal(2, 1024, dtype=mx.bfloat16, seed=2)
    weight = mx.ones(1024)
    with emulated():
        total, normed = add_rms_norm(x, branch, weight, EPS)
        assert (total.dtype, normed.dtype) == (mx.float32, mx.bfloat16)
        assert mx.array_equal(total, x.astype(mx.float32) + branch.astype(mx.float32))
        assert mx.array_equal(normed, rms_norm(total, weight, EPS, mx.bfloat16))


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_strided_rows_are_read_in_place(order):
    wide, weight = normal(2, 5, 400)[:, 1:4], normal(200, seed=1)[::2]
    x, branch = wide[..., 20:120], wide[..., 399:199:-2]
    with emulated(checked=True, order=order) as report:
        check_add_rms_norm(x, branch, weight)
        assert_close(rms_norm(branch, weight, EPS), reference.rms_norm(branch, weight, EPS, branch.dtype))
    assert report.count("mlx_qwen_add_rms_norm") == 1


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_every_byte_moves_once(order):
    rows, D = 2, 2560
    x, branch, weight = normal(rows, D), normal(rows, D, seed=1), normal(D, seed=2)
    with emulated(checked=True, order=order) as report:
        check_add_rms_norm(x, branch, weight)
    buffers = report.launches[0].buffers
    assert all(buffers[name].read == buffers[name].size for name in ("x", "branch"))
    assert all(buffers[name].written == buffers[name].size for name in ("total", "normed"))
    assert buffers["weight"].unique_read == buffers["weight"].size


@pytest.mark.parametrize(
    ("x", "weight", "because"),
    [
        (normal(2, 8200), normal(8200), "rows are not 8 to 8192 wide"),
        (normal(2, 4), normal(4), "rows are not 8 to 8192 wide"),
        (normal(2, 64), normal(64, dtype=mx.bfloat16), "dtype"),
        (mx.zeros((0, 64)), normal(64), "empty input"),
    ],
    ids=["too wide", "too narrow", "short weight", "empty"],
)
def test_what_the_kernels_do_not_take_runs_as_the_reference(x, weight, because):
    with emulated() as report:
        assert mx.array_equal(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS, x.dtype))
        total, _ = add_rms_norm(x, x, weight, EPS)
        assert mx.array_equal(total, x + x)
    assert report.count() == 0
    assert stats()["add_rms_norm"] == OpStats(reference={because: 1})


def test_a_branch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="expected the stream's shape"):
        add_rms_norm(normal(2, 64), normal(64), normal(64), EPS)


@pytest.mark.parametrize(
    ("sound", "broken", "kind"),
    [
        ("metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);", "", "uninitialised read"),
        ("if (i < row.size) {\n      normed", "if (i <= row.size) {\n      normed", "out of bounds"),
        ("row.lane < row.simdgroups ?", "row.lane <= row.simdgroups ?", "uninitialised read"),
    ],
    ids=["missing barrier", "one element too many", "one partial sum too many"],
)
def test_a_broken_kernel_is_caught(monkeypatch, sound, broken, kind):
    text = _build.source_text
    monkeypatch.setattr(_build, "source_text", lambda file: text(file).replace(sound, broken))
    _build._built.cache_clear()
    try:
        with emulated(checked=True), pytest.raises(KernelError) as caught:
            rms_norm(normal(1, 300), normal(300, seed=1), EPS)
    finally:
        _build._built.cache_clear()
    assert caught.value.kind == kind
