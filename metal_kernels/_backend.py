"""Which implementation of an operation runs, and how often each one did."""

import os
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum

import mlx.core as mx

from metal_kernels._choices import choices

ENVIRONMENT_VARIABLE = "MLX_QWEN_KERNELS"


class Backend(Enum):
    """The implementation that an operation uses when a kernel takes its shapes and dtypes."""

    METAL = "metal"
    REFERENCE = "reference"


@dataclass
class OpStats:
    """Calls of one operation since the last :func:`reset_stats`.

    Attributes:
        kernel: calls that ran as a Metal kernel.
        reference: calls that ran as plain MLX, by the reason why.
    """

    kernel: int = 0
    reference: dict[str, int] = field(default_factory=dict)


_kernel_calls: Counter[str] = Counter()
_reference_calls: Counter[tuple[str, str]] = Counter()


def backend() -> Backend:
    """Return the backend that ``MLX_QWEN_KERNELS`` asks for at this moment.

    ``auto`` (also when unset) is Metal when the default device is a GPU and Metal is available, else the reference;
    ``metal`` is always Metal, without asking whether the machine has it, so that an emulator can stand in;
    ``reference`` is always plain MLX.

    Raises:
        ValueError: the variable holds anything else.
    """
    return _backend_of(_asked_for())


def _asked_for() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


def _backend_of(choice: str) -> Backend:
    if choice == "reference":
        return Backend.REFERENCE
    if choice == "metal":
        return Backend.METAL
    if choice == "auto":
        on_gpu = mx.default_device() == mx.gpu and mx.metal.is_available()
        return Backend.METAL if on_gpu else Backend.REFERENCE
    raise ValueError(
        f"{ENVIRONMENT_VARIABLE} is {choice!r}, expected auto, metal or reference; "
        f"set it to one of these or unset it (the same as auto)"
    )


def machine_chooses() -> bool:
    """Whether kernels run as far as this machine has shown that they should: not when ``MLX_QWEN_KERNELS`` insists."""
    return backend() is Backend.METAL and _asked_for() != Backend.METAL.value


def count_kernel(op: str) -> None:
    """Count one call of ``op`` that runs as a kernel."""
    _kernel_calls[op] += 1


def count_reference(op: str, because: str) -> None:
    """Count one call of ``op`` that runs as the reference, and why it does."""
    _reference_calls[op, because] += 1


def takes_kernel(op: str, unsupported: str | None) -> bool:
    """Whether ``op`` runs as a kernel, given why its kernel does not take the inputs, or None; counts the answer.

    What this machine has left out runs as the reference, unless ``MLX_QWEN_KERNELS`` is ``metal``.
    """
    choice = _asked_for()
    because = "reference backend" if _backend_of(choice) is Backend.REFERENCE else unsupported
    if because is None and choice != Backend.METAL.value:
        because = choices().left_out.get(op)
    if because is None:
        count_kernel(op)
    else:
        count_reference(op, because)
    return because is None


def stats() -> dict[str, OpStats]:
    """Return, by operation, how often it ran as a kernel and as the reference since the last :func:`reset_stats`.

    Counts are taken when a call builds its graph: a compiled function that is replayed counts once.
    """
    result: dict[str, OpStats] = {}
    for op, calls in _kernel_calls.items():
        result.setdefault(op, OpStats()).kernel = calls
    for (op, because), calls in _reference_calls.items():
        result.setdefault(op, OpStats()).reference[because] = calls
    return result


def reset_stats() -> None:
    """Set every count back to zero."""
    _kernel_calls.clear()
    _reference_calls.clear()
