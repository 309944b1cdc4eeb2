"""MLX's own kernels whose work ours do, from the headers in its wheel, as the register count takes them."""

import re
from pathlib import Path

import mlx.core as mx

from tests.metal_emulator.signature import KernelSource, make_signature
from tests.metal_kernels.specialisation import Specialisation

_HEADERS = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "metal" / "kernels"
_PRELUDE = """#include <metal_stdlib>
using namespace metal;
#define METAL_FUNC inline
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
"""
_POSITIONS = "thread_position_in_grid, thread_position_in_threadgroup, thread_index_in_simdgroup"
_ARGUMENTS = f"q, k, v, state, g, beta, y, next, T, {_POSITIONS}"
_DELTA = ("q", "k", "v", "state", "g", "beta", "T")
_QMV_LANES = "threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup"


def mlx_kernels() -> dict[str, Specialisation]:
    """Quantized products of one row, and the gated delta rule in chunks of 8, each in bf16; by what the table says."""
    row = mx.zeros((1, 8), mx.bfloat16)
    delta = [*[row] * 3, mx.zeros((1, 8)), row, row, mx.array(64)]
    chunk = (
        f"gated_delta_fused_chunk<bfloat16_t, 128, 128, 16, 32, 8>(q, k, v, state, g, beta, y, next, T, {_POSITIONS});"
    )
    found = {
        "MLX's chunk of 8, keys of 128": _kernel(
            _text("gated_delta_update.h"), _DELTA, delta, ("y", "next"), chunk, (32, 4, 1)
        )
    }
    for bits in (4, 8):
        packed = [mx.zeros((8, 512), mx.uint32), row, row, row, mx.array(512), mx.array(8)]
        call = f"qmv_fast_impl<bfloat16_t, 64, {bits}>(w, scales, biases, x, y, K, N, {_QMV_LANES});"
        found[f"MLX's qmv_fast, {bits} bits"] = _kernel(
            _functions("quantized.h", "qmv_fast_impl"),
            ("w", "scales", "biases", "x", "K", "N"),
            packed,
            ("y",),
            call,
            (32, 2, 1),
        )
    return found


def _kernel(
    header: str,
    inputs: tuple[str, ...],
    arrays: list[mx.array],
    outputs: tuple[str, ...],
    source: str,
    threadgroup: tuple[int, int, int],
) -> Specialisation:
    kernel = KernelSource("mlx", inputs, outputs, source, _PRELUDE + header, True, False)
    dtypes = [mx.float32 if name == "next" else mx.bfloat16 for name in outputs]
    return Specialisation(kernel, make_signature(kernel, arrays, dtypes, ()), threadgroup)


def _text(name: str) -> str:
    """A header as functions that an entry calls: without includes, `[[kernel]]` and function constants."""
    text = re.sub(r"#include [^\n]*", "", (_HEADERS / name).read_text())
    text = re.sub(r"constant bool (\w+) \[\[[^\n]*\]\];", r"constant constexpr bool \1 = true;", text)
    return re.sub(r"\[\[.*?\]\]", "", text).replace("#pragma once", "")


def _functions(name: str, last: str) -> str:
    """The text up to the end of a function: what follows needs headers that only MLX's build has."""
    text = _text(name)
    end = text.index("\n}", text.index(f"{last}("))
    return text[: end + 3]
