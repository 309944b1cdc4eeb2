"""Short ways to make and run a kernel in the emulator's own tests."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from tests.metal_emulator import Report, emulated, metal_kernel
from tests.metal_emulator.launch import Order
from tests.metal_emulator.signature import TemplateValue

ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")


def run(
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]],
    *,
    grid: tuple[int, int, int] = (32, 1, 1),
    threadgroup: tuple[int, int, int] = (32, 1, 1),
    template: Sequence[tuple[str, TemplateValue]] = (),
    header: str = "",
    init_value: float | None = None,
    checked: bool = True,
    order: Order = "forward",
    contiguous: bool = True,
    atomic_outputs: bool = False,
    partial_outputs: Sequence[str] = (),
) -> tuple[list[mx.array], Report]:
    """Runs one kernel body and returns its outputs and the report."""
    with emulated(checked=checked, order=order, seed=1, partial_outputs=partial_outputs) as report:
        kernel = metal_kernel(
            name="tried",
            input_names=list(inputs),
            output_names=list(outputs),
            source=source,
            header=header,
            ensure_row_contiguous=contiguous,
            atomic_outputs=atomic_outputs,
        )
        arrays = kernel(
            inputs=list(inputs.values()),
            template=list(template),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[shape for shape, _ in outputs.values()],
            output_dtypes=[dtype for _, dtype in outputs.values()],
            init_value=init_value,
        )
    return arrays, report


def numbers(array: mx.array) -> list[int]:
    """A one-dimensional array of integers as a list."""
    return [int(value) for value in np.array(array)]


def floats(array: mx.array) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Any array as numpy float32."""
    return np.array(array.astype(mx.float32))
