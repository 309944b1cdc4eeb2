"""The report counts launches and bytes; the context puts everything back."""

import mlx.core as mx
import pytest

from tests.metal_emulator import KernelError, Traffic, emulated, metal_kernel
from tests.test_metal_emulator.kernels import numbers, run

COPY = "uint i = thread_position_in_grid.x; out[i] = x[i];"


def test_each_line_counts_once_per_threadgroup_and_once_per_launch() -> None:
    _, report = run(
        COPY + " if (i % 64 == 0) out[i] += table[0] + table[1];",
        {"x": mx.zeros((256,)), "table": mx.zeros((1000,))},
        {"out": ((256,), mx.float32)},
        grid=(256, 1, 1),
        threadgroup=(64, 1, 1),
    )
    (launch,) = report.launches
    assert launch.buffers["x"] == Traffic(size=1024, read=1024, written=0, unique_read=1024, unique_written=0)
    assert launch.buffers["table"] == Traffic(size=4000, read=256, written=0, unique_read=64, unique_written=0)
    assert launch.buffers["out"].written == launch.buffers["out"].unique_written == 1024
    assert launch.buffers["out"].read == 256
    assert launch.bytes_written == 1024
    assert launch.bytes_read == 1024 + 256 + 256


def test_lines_shared_by_neighbouring_threadgroups_count_for_both() -> None:
    _, report = run(COPY, {"x": mx.zeros((64,))}, {"out": ((64,), mx.float32)}, grid=(64, 1, 1), threadgroup=(8, 1, 1))
    assert report.launches[0].buffers["x"].read == 8 * 64
    assert report.launches[0].buffers["x"].unique_read == 4 * 64


def test_an_atomic_load_reads_and_an_atomic_store_writes() -> None:
    _, report = run(
        """
        uint old = atomic_load_explicit(&loaded[0], memory_order_relaxed);
        atomic_store_explicit(&stored[0], old, memory_order_relaxed);
        """,
        {},
        {"loaded": ((1,), mx.uint32), "stored": ((1,), mx.uint32)},
        init_value=0,
        atomic_outputs=True,
    )
    loaded, stored = report.launches[0].buffers.values()
    assert (loaded.read, loaded.written, stored.read, stored.written) == (64, 0, 0, 64)


def test_launches_are_counted_by_name_in_the_quick_mode_too() -> None:
    with emulated() as report:
        for name, times in (("one", 1), ("two", 2)):
            kernel = metal_kernel(name=name, input_names=["x"], output_names=["out"], source=COPY)
            for _ in range(times):
                kernel(
                    inputs=[mx.zeros((8,))],
                    grid=(8, 1, 1),
                    threadgroup=(8, 1, 1),
                    output_shapes=[(8,)],
                    output_dtypes=[mx.float32],
                )
    assert (report.count(), report.count("one"), report.count("two")) == (3, 1, 2)
    assert report.launches[0].grid == (8, 1, 1)


def test_a_partial_output_may_be_named() -> None:
    (out,), _ = run(
        "out[thread_position_in_grid.x * 2] = 1;",
        {},
        {"out": ((8,), mx.int32)},
        grid=(4, 1, 1),
        partial_outputs=["out"],
    )
    assert numbers(out)[::2] == [1] * 4


def test_an_error_tells_thread_threadgroup_and_line() -> None:
    source = "uint i = thread_position_in_grid.x;\nout[i] = 1;\nif (i == 40) out[i + 100] = 1;"
    with pytest.raises(KernelError) as caught:
        run(source, {}, {"out": ((64,), mx.int32)}, grid=(64, 1, 1), threadgroup=(32, 1, 1))
    error = caught.value
    assert (error.thread, error.threadgroup) == ((8, 0, 0), (1, 0, 0))
    assert (error.part, error.line, error.text) == ("source", 3, "if (i == 40) out[i + 100] = 1;")
    assert "out, element 140" in str(error)


def test_an_error_in_the_header_tells_its_line_there() -> None:
    header = "inline float beyond(const device float* p) {\n  return p[64];\n}\n"
    with pytest.raises(KernelError) as caught:
        run("out[0] = beyond(x);", {"x": mx.zeros((64,))}, {"out": ((1,), mx.float32)}, header=header, grid=(1, 1, 1))
    assert (caught.value.part, caught.value.line, caught.value.text) == ("header", 2, "return p[64];")


def test_metal_kernel_and_compilation_come_back_afterwards() -> None:
    original = mx.fast.metal_kernel
    with pytest.raises(KeyError), emulated():
        assert mx.fast.metal_kernel is metal_kernel
        raise KeyError
    assert mx.fast.metal_kernel is original
    calls = []

    def traced(x: mx.array) -> mx.array:
        calls.append(x)
        return x + 1

    compiled = mx.compile(traced)
    for value in range(2):
        compiled(mx.array(value))
    assert len(calls) == 1


def test_a_kernel_outlives_its_context_but_runs_only_inside_one() -> None:
    with emulated():
        kernel = metal_kernel(name="kept", input_names=["x"], output_names=["out"], source=COPY)

    def call() -> list[mx.array]:
        return kernel(
            inputs=[mx.arange(8)],
            grid=(8, 1, 1),
            threadgroup=(8, 1, 1),
            output_shapes=[(8,)],
            output_dtypes=[mx.int32],
        )

    with pytest.raises(RuntimeError, match=r"inside emulated\(\)"):
        call()
    with emulated() as report:
        assert call()[0].tolist() == list(range(8))
    assert report.count("kept") == 1


def test_too_large_a_threadgroup_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 1024 threads"):
        run("out[0] = 1;", {}, {"out": ((1,), mx.int32)}, grid=(2048, 1, 1), threadgroup=(2048, 1, 1))
