"""The function text that MLX makes around a custom kernel's body.

Follows `mx.fast.metal_kernel` of MLX 0.32; tests compare the text with MLX's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TemplateValue = int | bool | mx.Dtype

METAL_TYPES: dict[mx.Dtype, str] = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.float32: "float",
    mx.complex64: "complex64_t",
}

THREAD_ATTRIBUTES: dict[str, str] = {
    "dispatch_quadgroups_per_threadgroup": "uint",
    "dispatch_simdgroups_per_threadgroup": "uint",
    "dispatch_threads_per_threadgroup": "uint3",
    "grid_origin": "uint3",
    "grid_size": "uint3",
    "quadgroup_index_in_threadgroup": "uint",
    "quadgroups_per_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_execution_width": "uint",
    "thread_index_in_quadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "thread_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_grid": "uint3",
    "threads_per_simdgroup": "uint",
    "threads_per_threadgroup": "uint3",
}

# MLX passes arrays of fewer elements in the constant address space.
_SMALLEST_DEVICE_ARRAY = 8


@dataclass(frozen=True)
class KernelSource:
    """What `mx.fast.metal_kernel` is given."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str
    ensure_row_contiguous: bool
    atomic_outputs: bool


@dataclass(frozen=True)
class Parameter:
    """One buffer of the generated function; `role` says what is bound to it, `name` whose it is."""

    name: str
    role: str
    text: str
    cast: str


@dataclass(frozen=True)
class Signature:
    """A specialisation of a kernel: its parameters and the text that MLX would compile."""

    function: str
    parameters: tuple[Parameter, ...]
    attributes: tuple[str, ...]
    template_arguments: str
    opening: str
    body: str

    def text(self, header: str) -> str:
        """The generated source as MLX prints it with `verbose=True`."""
        text = f"{header}{self.opening}{self.body}\n}}\n"
        if self.template_arguments:
            instance = self.function + self.template_arguments
            text += f'\ntemplate [[host_name("{self.function}")]] [[kernel]] decltype({instance}) {instance};\n'
        return text

    def call(self) -> str:
        """A C++ expression that calls the function with `arguments`, a `void**` in the order of the parameters."""
        given = [parameter.cast.format(f"arguments[{i}]") for i, parameter in enumerate(self.parameters)]
        given += [f"emulator::attribute::{name}()" for name in self.attributes]
        return f"{self.function}{self.template_arguments}({', '.join(given)})"


def make_signature(
    kernel: KernelSource,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, TemplateValue]],
) -> Signature:
    """The signature MLX makes for these inputs, output types and template arguments.

    Raises ValueError when the number of inputs or outputs differs from the names the kernel was made with.
    """
    _check_count(kernel.name, "inputs", kernel.input_names, inputs)
    _check_count(kernel.name, "output dtypes", kernel.output_names, output_dtypes)
    parameters = _input_parameters(kernel, inputs)
    for name, dtype in zip(kernel.output_names, output_dtypes, strict=True):
        metal = METAL_TYPES[dtype]
        metal = f"atomic<{metal}>" if kernel.atomic_outputs else metal
        parameters.append(Parameter(name, "output", f"device {metal}* {name}", f"(device {metal}*){{}}"))
    attributes = tuple(name for name in THREAD_ATTRIBUTES if name in kernel.source)

    function = _function_name(kernel.name, inputs, output_dtypes, template)
    lines = [f"  {p.text} [[buffer({i})]]" for i, p in enumerate(parameters)]
    lines += [f"  {THREAD_ATTRIBUTES[name]} {name} [[{name}]]" for name in attributes]
    opening = f"[[kernel]] void {function}(\n" + ",\n".join(lines) + ") {\n"
    if template:
        declared = ", ".join(f"{_template_kind(value)} {name}" for name, value in template)
        opening = f"template <{declared}>\n{opening}"
    arguments = f"<{', '.join(_template_text(value) for _, value in template)}>" if template else ""
    return Signature(function, tuple(parameters), attributes, arguments, opening, kernel.source)


def _check_count(kernel: str, what: str, names: Sequence[str], given: Sequence[object]) -> None:
    if len(names) != len(given):
        raise ValueError(f"kernel {kernel} was made with {len(names)} {what} ({', '.join(names)}), got {len(given)}")


def _input_parameters(kernel: KernelSource, inputs: Sequence[mx.array]) -> list[Parameter]:
    parameters = []
    for name, array in zip(kernel.input_names, inputs, strict=True):
        metal = METAL_TYPES[array.dtype]
        space = "constant" if array.size < _SMALLEST_DEVICE_ARRAY else "device"
        if array.ndim == 0:
            cast = f"*(const {space} {metal}*){{}}"
            parameters.append(Parameter(name, "input", f"const {space} {metal}& {name}", cast))
            continue
        cast = f"(const {space} {metal}*){{}}"
        parameters.append(Parameter(name, "input", f"const {space} {metal}* {name}", cast))
        for role, kind, mark in (("shape", "int", "*"), ("strides", "int64_t", "*"), ("ndim", "int", "&")):
            if f"{name}_{role}" in kernel.source:
                deref = "*" if mark == "&" else ""
                text = f"const constant {kind}{mark} {name}_{role}"
                parameters.append(Parameter(name, role, text, f"{deref}(const constant {kind}*){{}}"))
    return parameters


def _function_name(
    name: str,
    inputs: Sequence[mx.array],
    output_dtypes: Sequence[mx.Dtype],
    template: Sequence[tuple[str, TemplateValue]],
) -> str:
    parts = [f"custom_kernel_{name}"]
    if template:
        parts.append("")
    parts += [_template_text(value).replace("-", "_") for _, value in template]
    for array in inputs:
        suffix = "s" if array.ndim == 0 else "c" if array.size < _SMALLEST_DEVICE_ARRAY else ""
        parts.append(METAL_TYPES[array.dtype] + suffix)
    parts += [METAL_TYPES[dtype] for dtype in output_dtypes]
    return "_".join(parts)


def _template_kind(value: TemplateValue) -> str:
    if isinstance(value, bool):
        return "bool"
    return "int" if isinstance(value, int) else "typename"


def _template_text(value: TemplateValue) -> str:
    return METAL_TYPES[value] if isinstance(value, mx.Dtype) else str(int(value))
