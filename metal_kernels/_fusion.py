"""Element-wise work around the kernels, fused into few launches where launches count."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx

from metal_kernels._backend import Backend, backend

P = ParamSpec("P")
R = TypeVar("R")


def fused_on_metal(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, through `mx.compile` on the Metal backend: a graph a shape, element-wise chains in one kernel each.

    On the reference backend it stays as it is: compiling for a CPU needs a C++ compiler and costs seconds.
    """
    compiled: Callable[P, R] = mx.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (compiled if backend() is Backend.METAL else function)(*args, **kwargs)

    return call
