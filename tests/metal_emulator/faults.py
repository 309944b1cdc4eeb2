"""Turns the runtime's record of a failure into a KernelError."""

from collections.abc import Sequence

from tests.metal_emulator.launch import Binding, FailureRecord
from tests.metal_emulator.report import ErrorKind, KernelError
from tests.metal_emulator.signature import KernelSource
from tests.metal_emulator.translate import readable_diagnostics, source_line

_KINDS: tuple[ErrorKind, ...] = (
    "compile",
    "out of bounds",
    "misaligned",
    "race",
    "double write",
    "divergence",
    "uninitialised read",
    "write to input",
    "unwritten output",
    "threadgroup memory",
    "undefined behaviour",
)
_NO_BUFFER = 2**32 - 1


def diagnosed(kernel: KernelSource, kind: ErrorKind, messages: str) -> KernelError:
    """The error for a text that the compiler rejects."""
    message, first = readable_diagnostics(kernel, messages)
    part, line, text = source_line(kernel, first)
    return KernelError(kernel.name, kind, message.strip(), part=part, line=line if part else 0, text=text)


def error_of(kernel: KernelSource, failure: FailureRecord, bindings: Sequence[Binding]) -> KernelError:
    """The error that describes a failure in the kernel's own terms."""
    message = failure.text.decode()
    if 0 < failure.buffer <= len(bindings):
        binding = bindings[failure.buffer - 1]
        first = (binding.start - binding.low) // binding.itemsize
        message += f" ({binding.name}, element {failure.offset // binding.itemsize - first})"
    elif failure.buffer == _NO_BUFFER:
        message += f" (threadgroup memory, byte {failure.offset})"
    if failure.other_line:
        part, line, text = source_line(kernel, failure.other_line)
        message += f"; the other is at {part} line {line}: {text}"
    part, line, text = source_line(kernel, failure.line)
    return KernelError(
        kernel.name,
        _KINDS[failure.kind],
        message,
        thread=_triple(failure.thread) if failure.has_thread else None,
        threadgroup=_triple(failure.group) if failure.has_thread else None,
        part=part,
        line=line if part else 0,
        text=text,
    )


def _triple(values: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
