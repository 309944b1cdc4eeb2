"""Kernels take arrays that begin at any of their elements, as MLX's views do: no vector load assumes more."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import pytest

from metal_kernels import calls, tuning_cases
from metal_kernels._backend import Backend
from metal_kernels.calls import AttentionSizes, ExpertSizes, SparseCalls, sparse_weights
from metal_kernels.gated_delta import Heads
from metal_kernels.parity import Arrays, difference, forced
from metal_kernels.tuning_cases import ModelSizes, cases, rule_case
from tests.metal_emulator import emulated, memory

HEADS, ATTENTION = Heads(1, 32, 2, 32), AttentionSizes(2, 1, 32, 8)
Run = Callable[[], Arrays]


def misplaced(x: mx.array) -> mx.array:
    """The same elements in order, from the second of an allocation on."""
    view = mx.concatenate([mx.zeros(1, x.dtype), x.flatten()])[1:].reshape(x.shape)
    mx.eval(view)
    return view


def runs(dtype: mx.Dtype) -> Iterator[tuple[str, Run]]:
    """Every kernel once, with experts packed and not."""
    sizes = ModelSizes(dtype, 64, HEADS, 4, ATTENTION, ExpertSizes(3, 2, 32, 32, 0), 32, vocabulary=320)
    for case in cases(sizes):
        yield case.kernel, case.calls
    rule = rule_case(sizes, 18)
    yield "gated_delta_prefill_sequential", lambda: rule.run("sequential")
    yield "gated_delta_prefill_chunked", lambda: rule.run("chunked")
    for bits in (4, 8):
        experts = ExpertSizes(3, 2, 32, 32, bits, 32)
        yield f"experts of {bits} bits", SparseCalls(experts, 64, 2, dtype, sparse_weights(experts, 64, dtype)).layer


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_every_kernel_takes_arrays_that_begin_at_an_odd_element(
    monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    made = calls.normal
    monkeypatch.setattr(calls, "normal", lambda *shape, **how: misplaced(made(*shape, **how)))
    monkeypatch.setattr(tuning_cases, "_CONTEXT", 40)
    tolerance = 1e-5 if dtype == mx.float32 else 4e-2
    for kernel, run in runs(dtype):
        with forced(Backend.REFERENCE):
            expected = run()
        with forced(Backend.METAL), emulated(checked=True) as report:
            assert difference(run(), expected) <= tolerance, kernel
        assert report.launches, kernel


def test_an_odd_element_stays_one_where_the_emulator_puts_an_array() -> None:
    x = mx.arange(64, dtype=mx.bfloat16)
    for begin in range(9):
        held = memory.hold_input("x", x[begin:], row_contiguous=True)
        assert held.binding.start % 16 == 2 * begin % 16 and not held.copied
