"""The stand-in for `mx.fast.metal_kernel` and for the callable it returns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from tests.metal_emulator import compiler, launch, memory, rules
from tests.metal_emulator.faults import diagnosed, error_of
from tests.metal_emulator.report import ErrorKind, KernelError, LaunchRecord, Report, Traffic
from tests.metal_emulator.signature import KernelSource, Signature, TemplateValue, make_signature
from tests.metal_emulator.translate import translation_unit

_LINE_BYTES = 64


@dataclass(frozen=True)
class Settings:
    """How kernels run: checked or quick, in which order, and the outputs that may stay partly unwritten."""

    checked: bool
    order: launch.Order
    seed: int
    partial_outputs: frozenset[str]
    report: Report


_active: list[Settings] = []


@contextmanager
def emulated(
    *,
    checked: bool = False,
    order: launch.Order = "forward",
    seed: int = 0,
    partial_outputs: Sequence[str] = (),
) -> Iterator[Report]:
    """Replaces `mx.fast.metal_kernel` by the emulator and yields the report of launches.

    checked: find races, stray accesses, divergence and the like (slower), and count bytes per buffer.
    order: in which lanes, SIMD groups and threadgroups run; seed is for "random".
    partial_outputs: names of outputs whose elements need not all be written.

    Kernels run at once, so `mx.compile` is off inside. Kernels made inside work inside any later `emulated()`.
    Faults raise KernelError.
    """
    report = Report()
    _active.append(Settings(checked, order, seed, frozenset(partial_outputs), report))
    mx.disable_compile()
    try:
        with patch.object(mx.fast, "metal_kernel", metal_kernel):
            yield report
    finally:
        _active.pop()
        if not _active:
            mx.enable_compile()


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: object | None = None,
) -> "EmulatedKernel":
    """As `mx.fast.metal_kernel`. compile_options have no effect: arithmetic is always IEEE."""
    del compile_options
    return EmulatedKernel(
        KernelSource(
            name, tuple(input_names), tuple(output_names), source, header, ensure_row_contiguous, atomic_outputs
        )
    )


@dataclass(frozen=True)
class EmulatedKernel:
    """A kernel that runs on the CPU when called, with the arguments of MLX's own."""

    source: KernelSource

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array | bool | int | float],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: mx.Stream | mx.Device | None = None,
    ) -> list[mx.array]:
        """Runs the grid and returns one array per output name.

        Raises KernelError for a fault in the kernel and ValueError for arguments MLX would refuse.
        """
        del stream
        if not _active:
            raise RuntimeError(f"kernel {self.source.name} was made by the emulator: call it inside emulated()")
        settings = _active[-1]
        arrays = [given if isinstance(given, mx.array) else mx.array(given) for given in inputs]
        signature = make_signature(self.source, arrays, output_dtypes, tuple(template or ()))
        if verbose:
            print(f"Generated source code for `{self.source.name}`:\n```\n{signature.text(self.source.header)}\n```")
        if because := rules.refused_outright(self.source, signature):
            raise KernelError(self.source.name, "metal rules", because)
        sizes = _sizes(self.source.name, grid), _sizes(self.source.name, threadgroup)
        if sizes[1][0] * sizes[1][1] * sizes[1][2] > launch.THREADS_PER_GROUP:
            raise ValueError(f"{self.source.name}: a threadgroup has at most 1024 threads, got {tuple(threadgroup)}")

        shapes = [tuple(shape) for shape in output_shapes]
        held = _bind(self.source, signature, settings, arrays, shapes, output_dtypes, init_value)
        bindings = [each.binding for each in held]
        library = _library(self.source, signature, settings.checked)
        outcome = launch.run(library, bindings, *sizes, settings.order, settings.seed)
        if outcome.failure.kind:
            raise error_of(self.source, outcome.failure, bindings)
        copied = tuple(each.binding.name for each in held if each.copied)
        traffic = _traffic(signature, outcome) if settings.checked else {}
        settings.report.launches.append(LaunchRecord(self.source.name, *sizes, copied, traffic))
        outputs = held[len(held) - len(shapes) :]
        return [
            memory.output_array(each, shape, dtype)
            for each, shape, dtype in zip(outputs, shapes, output_dtypes, strict=True)
        ]


def _sizes(kernel: str, given: Sequence[int]) -> tuple[int, int, int]:
    if len(given) != 3 or min(given) < 1:
        raise ValueError(f"{kernel}: grid and threadgroup are three positive sizes, got {tuple(given)}")
    x, y, z = given
    return x, y, z


def _bind(
    kernel: KernelSource,
    signature: Signature,
    settings: Settings,
    arrays: Sequence[mx.array],
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[mx.Dtype],
    init_value: float | None,
) -> list[memory.Held]:
    """Memory for every parameter, in order; outputs come last."""
    inputs = {
        name: memory.hold_input(name, array, row_contiguous=kernel.ensure_row_contiguous)
        for name, array in zip(kernel.input_names, arrays, strict=True)
    }
    held = []
    for parameter in signature.parameters:
        if parameter.role == "output":
            continue
        array = inputs[parameter.name]
        described = {"shape": array.shape, "strides": array.strides, "ndim": (len(array.shape),)}.get(parameter.role)
        if described is None:
            held.append(array)
        else:
            kind = np.int64 if parameter.role == "strides" else np.int32
            held.append(memory.hold_value(f"{parameter.name}_{parameter.role}", np.array(described, dtype=kind)))
    for name, shape, dtype in zip(kernel.output_names, shapes, dtypes, strict=True):
        partial = name in settings.partial_outputs
        held.append(memory.hold_output(name, shape, dtype, init_value, may_stay_unwritten=partial))
    return held


@lru_cache(maxsize=4096)
def _library(kernel: KernelSource, signature: Signature, checked: bool) -> Path:
    unit = translation_unit(kernel, signature)
    try:
        return compiler.library(unit, checked=checked)
    except compiler.CompileError as error:
        kind: ErrorKind = "metal rules" if isinstance(error, compiler.MetalRulesError) else "compile"
        raise diagnosed(kernel, kind, str(error)) from None


def _traffic(signature: Signature, outcome: launch.Outcome) -> dict[str, Traffic]:
    """Traffic of inputs and outputs by name; shapes, strides and ranks do not count."""
    return {
        parameter.name: Traffic(
            size=buffer.size,
            read=buffer.read_lines * _LINE_BYTES,
            written=buffer.written_lines * _LINE_BYTES,
            unique_read=buffer.unique_read_lines * _LINE_BYTES,
            unique_written=buffer.unique_written_lines * _LINE_BYTES,
        )
        for parameter, buffer in zip(signature.parameters, outcome.buffers, strict=True)
        if parameter.role in ("input", "output")
    }
