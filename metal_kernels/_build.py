"""From a `.metal` file to a callable: the file is the header, and the kernel's body is one generated call into it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

Triple = tuple[int, int, int]
TemplateValue = int | bool | mx.Dtype
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


@dataclass(frozen=True)
class MetalKernel:
    """One function of a `.metal` file, built when it is first called.

    Attributes:
        file: the `.metal` file; an `#include "path"` line takes in the file at that path from its own folder, once.
        function: qualified name of the templated function in it.
        inputs, outputs: names of the buffers, in the order in which calls give them.
        template: names of the template parameters, in the function's order; calls give a value for each.
        arguments: what the function is called with, in its order: buffers, `<input>_shape`, `<input>_strides`, thread
            attributes such as `thread_position_in_grid`, and threadgroup arrays.
        threadgroup_arrays: declarations such as "float tile[32 * Dk]", made in the body.
        row_contiguous: whether MLX copies inputs that are not; without, the function must use the strides.
    """

    file: Path
    function: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    template: tuple[str, ...]
    arguments: tuple[str, ...]
    threadgroup_arrays: tuple[str, ...] = ()
    row_contiguous: bool = True

    def __call__(
        self,
        inputs: Sequence[mx.array],
        template: Sequence[TemplateValue],
        *,
        grid: Triple,
        threadgroup: Triple,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        """Launch once; `grid` counts threads. Every element of every output must be written by the kernel."""
        kernel = _built(self, mx.fast.metal_kernel)
        outputs: list[mx.array] = kernel(
            inputs=list(inputs),
            template=list(zip(self.template, template, strict=True)),
            grid=grid,
            threadgroup=threadgroup,
            output_shapes=[list(shape) for shape in output_shapes],
            output_dtypes=list(output_dtypes),
        )
        return outputs

    def body(self) -> str:
        """The generated source: threadgroup arrays and the call."""
        arrays = "".join(f"threadgroup {declaration};\n" for declaration in self.threadgroup_arrays)
        parameters = f"<{', '.join(self.template)}>" if self.template else ""
        return f"{arrays}{self.function}{parameters}({', '.join(self.arguments)});\n"


@cache
def _built(kernel: MetalKernel, factory: Any) -> Any:
    """Keyed by the factory too, since tests put an emulator in the place of `mx.fast.metal_kernel`."""
    return factory(
        name=kernel.function.replace("::", "_"),
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        source=kernel.body(),
        header=compact(source_text(kernel.file)),
        ensure_row_contiguous=kernel.row_contiguous,
    )


@cache
def source_text(file: Path) -> str:
    """The text of a `.metal` file with its quoted includes taken in, and theirs."""
    taken: set[Path] = set()

    def text(file: Path) -> str:
        def include(match: re.Match[str]) -> str:
            included = (file.parent / match.group(1)).resolve()
            if included in taken:
                return ""
            taken.add(included)
            return text(included)

        return _INCLUDE.sub(include, file.read_text(encoding="utf-8"))

    return text(file)


def compact(text: str) -> str:
    """Metal text without comments, indentation and empty lines. MLX hashes all of it at every launch, and reads ASCII.

    Raises:
        ValueError: what is left is not ASCII.
    """
    lines = (line.strip() for line in _COMMENT.sub(" ", text).split("\n"))
    left = "".join(f"{line}\n" for line in lines if line and line != "#pragma once")
    if not left.isascii():
        line = next(line for line in left.split("\n") if not line.isascii())
        raise ValueError(f"Metal text must be ASCII outside comments, found {line!r}; write it with ASCII characters")
    return left
