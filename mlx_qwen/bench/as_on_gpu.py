"""Builds graphs on any machine as a GPU would get them, with arrays that hold no memory. They cannot be evaluated.

Operations whose CPU version is a graph of its own, and kernels, become one node each.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from metal_kernels._backend import ENVIRONMENT_VARIABLE


def weightless(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of one repeated zero, without the memory of its size."""
    array = mx.broadcast_to(mx.zeros((), dtype), shape)
    mx.eval(array)
    return array


# A node's outputs may share it, as they never hold anything; and calls that are timed do not wait for it.
_nothing = cache(weightless)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kind of node; `marker` is an input that no other kind has.

    Attributes:
        needs_order: whether MLX copies inputs whose elements are not in order.
        only_copies: whether it launches nothing else.
    """

    name: str
    marker: mx.array
    needs_order: bool
    only_copies: bool

    def __call__(self, inputs: Sequence[Any], shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
        """A node with one output."""
        return self.node(inputs, [shape], [dtype])[0]

    def node(
        self, inputs: Sequence[Any], shapes: Sequence[Sequence[int]], dtypes: Sequence[mx.Dtype]
    ) -> list[mx.array]:
        """A node with outputs of these shapes; inputs that are None are left out."""
        given = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs if x is not None]
        outputs = [_nothing(tuple(shape), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        nodes: list[mx.array] = mx.depends(outputs, [self.marker, *given])
        return nodes


class Launches:
    """The kinds of nodes met so far, by name."""

    def __init__(self) -> None:
        self.kinds: dict[str, Launch] = {}

    def kind(self, name: str, *, needs_order: bool = False, only_copies: bool = False) -> Launch:
        """The kind of that name, made when it is first asked for."""
        if name not in self.kinds:
            marker = weightless((0, len(self.kinds) + 1), mx.float32)
            self.kinds[name] = Launch(name, marker, needs_order, only_copies)
        return self.kinds[name]


@contextmanager
def as_on_gpu() -> Iterator[Launches]:
    """Inside, MLX seems to have a GPU, and models build the graphs that they would build there.

    Yields:
        the kinds of nodes that stand for `mx.fast` operations, kernels and (de)quantization.
    """
    launches = Launches()
    stand_ins: dict[Any, dict[str, Callable[..., object]]] = {
        mx: {
            "default_device": lambda: mx.Device(mx.gpu, 0),
            "dequantize": _dequantize(launches),
            "contiguous": _contiguous(launches),
        },
        mx.metal: {"is_available": lambda: True},
        mx.fast: {
            "metal_kernel": _metal_kernel(launches),
            "rms_norm": _rms_norm(launches),
            "rope": _rope(launches),
            "scaled_dot_product_attention": _attention(launches),
        },
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "metal"}))
        for module, functions in stand_ins.items():
            for name, function in functions.items():
                stack.enter_context(patch.object(module, name, function))
        yield launches


def _metal_kernel(launches: Launches) -> Callable[..., object]:
    def metal_kernel(*, name: str, ensure_row_contiguous: bool = True, **_: object) -> Callable[..., list[mx.array]]:
        kind = launches.kind(name, needs_order=ensure_row_contiguous)

        def kernel(
            *,
            inputs: Sequence[Any],
            output_shapes: Sequence[Sequence[int]],
            output_dtypes: Sequence[mx.Dtype],
            init_value: float | None = None,
            **_: object,
        ) -> list[mx.array]:
            # Filling the outputs first is a launch of its own.
            filled = [mx.full(output_shapes[0], init_value)] if init_value is not None else []
            return kind.node([*inputs, *filled], output_shapes, output_dtypes)

        return kernel

    return metal_kernel


def _rms_norm(launches: Launches) -> Callable[..., object]:
    kind = launches.kind("rms_norm", needs_order=True)

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **_: object) -> mx.array:
        dtype = x.dtype if weight is None else mx.result_type(x, weight)
        return kind([x.astype(dtype), weight if weight is None else weight.astype(dtype)], x.shape, dtype)

    return rms_norm


def _rope(launches: Launches) -> Callable[..., object]:
    kind = launches.kind("rope")

    def rope(x: mx.array, dims: int, *, offset: Any, freqs: mx.array | None = None, **_: object) -> mx.array:
        return kind([x, offset, freqs], x.shape, x.dtype)

    return rope


def _attention(launches: Launches) -> Callable[..., object]:
    kind = launches.kind("scaled_dot_product_attention")

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **_: object) -> mx.array:
        mask = mask if isinstance(mask, mx.array) else None
        return kind([q, k, v, mask], (*q.shape[:-1], v.shape[-1]), q.dtype)

    return attention


def _dequantize(launches: Launches) -> Callable[..., object]:
    kind = launches.kind("dequantize", needs_order=True)

    def dequantize(
        weight: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        group_size: int | None = None,
        bits: int | None = None,
        **_: object,
    ) -> mx.array:
        assert bits is not None, "every checkpoint says how many bits its weights have"
        return kind([weight, scales, biases], (*weight.shape[:-1], weight.shape[-1] * 32 // bits), scales.dtype)

    return dequantize


def _contiguous(launches: Launches) -> Callable[..., object]:
    kind = launches.kind("contiguous", needs_order=True, only_copies=True)

    def contiguous(x: mx.array, **_: object) -> mx.array:
        return kind([x], x.shape, x.dtype)

    return contiguous
