"""Each fault, put into a kernel on purpose, is found in every order and named with its line."""

from dataclasses import dataclass, field

import mlx.core as mx
import pytest

from tests.metal_emulator import KernelError
from tests.metal_emulator.launch import Order
from tests.test_metal_emulator.kernels import ORDERS, run

I = "uint i = thread_position_in_grid.x;\n"  # noqa: E741
L = "uint t = thread_index_in_threadgroup;\n"
# Threadgroup memory that is written before the fault, so that only the fault is one.
S = I + L + "threadgroup float s[64];\ns[t] = 0;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"


@dataclass(frozen=True)
class Broken:
    """A kernel body with one fault of a kind; `blamed` is a piece of the line that must be named."""

    kind: str
    source: str
    blamed: str = ""
    header: str = ""
    threads: int = 64
    group: int = 64
    inputs: dict[str, mx.array] = field(default_factory=lambda: {"x": mx.arange(64).astype(mx.float32)})
    size: int = 64
    atomic: bool = False
    init_value: float | None = None
    contiguous: bool = True


BROKEN = {
    "a missing threadgroup barrier": Broken("race", S + "s[t] = x[i];\nout[i] = s[63 - t];", "s["),
    "a barrier too early": Broken(
        "race",
        S + "threadgroup_barrier(mem_flags::mem_threadgroup);\ns[t] = x[i];\nfloat v = s[63 - t];\nout[i] = v;",
        "s[",
    ),
    "a missing barrier before memory is used again": Broken(
        "race",
        S + "float sum = 0;\nfor (int k = 0; k < 2; ++k) {\n  s[t] = x[i] + k;\n"
        "  threadgroup_barrier(mem_flags::mem_threadgroup);\n  sum += s[63 - t];\n}\nout[i] = sum;",
        "s[",
    ),
    "a barrier of the wrong memory": Broken(
        "race",
        S + "s[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\nout[i] = s[63 - t];",
        "s[",
    ),
    "a SIMD barrier where a threadgroup barrier is needed": Broken(
        "race",
        S + "s[t] = x[i];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[63 - t];",
        "s[",
    ),
    "a SIMD barrier before a write to what other SIMD groups read": Broken(
        "race",
        S + "float v = s[0];\nsimdgroup_barrier(mem_flags::mem_threadgroup);\nif (t == 0)\n  s[0] = 1;\nout[i] = v;",
        "s[0]",
    ),
    "a write to what other lanes of the SIMD group read": Broken(
        "race",
        S + "float v = 0;\nif (t < 32)\n  v = s[0];\nv = simd_sum(v);\nif (t == 30)\n  s[0] = v;\nout[i] = v;",
        "s[0]",
    ),
    "a write to what another threadgroup read": Broken(
        "race",
        I + "if (i % 32 == 31)\n  if (out[0] == 0 && i == 63)\n    out[0] = 1;",
        "out[0]",
        group=32,
        size=1,
        init_value=0,
    ),
    "lanes of one SIMD group without a barrier": Broken("race", S + "s[t] = x[i];\nout[i] = s[t ^ 1];", "s["),
    "two threadgroups sharing an output": Broken(
        "race",
        I + "if (i < 32) out[i] = x[i];\nelse out[i] = out[i - 32];",
        "out[i",
        group=32,
        init_value=0,
    ),
    "threads of a group sharing an output": Broken(
        "race", I + "out[i] = x[i];\nif (i > 0) out[i] += out[i - 1];", "out[", init_value=0
    ),
    "atomic and plain access to one element": Broken(
        "race",
        "if (thread_position_in_grid.x == 1)\n  *(device uint*)out = 5;\n"
        "else atomic_fetch_add_explicit(&out[0], 1, memory_order_relaxed);",
        size=1,
        atomic=True,
        init_value=0,
    ),
    "an index past an input": Broken("out of bounds", I + "float v = x[i + 1];\nout[i] = v;", "x[i + 1]"),
    "an index before an input": Broken("out of bounds", I + "float v = x[int(i) - 1];\nout[i] = v;", "x[int(i) - 1]"),
    "an index past an output": Broken("out of bounds", I + "out[i] = 0;\nout[i + 64] = 0;", "out[i + 64]"),
    "an index far away": Broken("out of bounds", I + "out[i] = x[ulong(i) << 30 | 1 << 29];", "x["),
    "an index past a threadgroup array": Broken(
        "out of bounds", L + "threadgroup float s[64];\ns[t + 1] = 0;\nout[t] = 0;", "s[t + 1]"
    ),
    "a threadgroup pointer past all variables": Broken(
        "out of bounds",
        L + "threadgroup float s[64];\nthreadgroup float* p = s;\np[t + 64] = 0;\nout[t] = 0;",
        "p[t + 64]",
    ),
    "an index past a local array": Broken(
        "out of bounds", I + "float v[4] = {1, 2, 3, 4};\nout[i] = v[i % 5];", "v[i % 5]"
    ),
    "an unaligned vector load": Broken(
        "misaligned",
        I + "float4 v = *(const device float4*)(x + (i & 31) + 1);\nout[i] = v.x;",
        "float4",
    ),
    "a vector load from an unaligned view": Broken(
        "misaligned",
        "out[0] = ((const device float4*)x)[0].x;",
        "float4",
        inputs={"x": mx.arange(64).astype(mx.float32)[1:60]},
        size=1,
        threads=1,
        contiguous=False,
    ),
    "threadgroup memory read before it is written": Broken(
        "uninitialised read", L + "threadgroup float s[64];\nout[t] = s[t];", "s[t]"
    ),
    "an output read before it is written": Broken("uninitialised read", I + "out[i] += x[i];", "out[i] += x[i]"),
    "a local read before it is written": Broken(
        "metal rules", I + "float sum;\nfor (int k = 0; k < 2; ++k) sum += x[i];\nout[i] = sum;", "sum"
    ),
    "an element no thread writes": Broken("unwritten output", I + "if (i != 7) out[i] = x[i];"),
    "two threads writing different values": Broken("double write", I + "out[i / 2] = x[i];", "out[i / 2]", size=32),
    "two threadgroups writing different values": Broken(
        "double write", I + "out[i % 32] = x[i];", "out[i % 32]", group=32, size=32
    ),
    "a SIMD sum that half the lanes skip": Broken(
        "divergence", I + "float v = x[i];\nif (i % 2) v = simd_sum(v);\nout[i] = v;", "simd_sum"
    ),
    "SIMD operations in two branches": Broken(
        "divergence",
        I + "float v = x[i];\nif (i % 2)\n  v = simd_sum(v);\nelse\n  v = simd_max(v);\nout[i] = v;",
        "simd_",
    ),
    "a loop whose lanes stop at different times": Broken(
        "divergence",
        I + "float v = x[i];\nfor (uint k = 0; k <= i % 2; ++k)\n  v = simd_sum(v);\nout[i] = v;",
        "simd_sum",
    ),
    "a barrier that one SIMD group skips": Broken(
        "divergence",
        I + "if (i < 32)\n  threadgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = 0;",
        "threadgroup_barrier",
    ),
    "SIMD groups at two barriers": Broken(
        "divergence",
        I + "out[i] = 0;\nif (i < 32)\n  threadgroup_barrier(mem_flags::mem_none);\n"
        "else\n  threadgroup_barrier(mem_flags::mem_none);",
        "threadgroup_barrier",
    ),
    "a shuffle from a lane that a clipped group lacks": Broken(
        "divergence", I + "out[i] = simd_shuffle(x[i], 20);", "simd_shuffle", threads=42, group=32, size=42
    ),
    "a write to an input": Broken("write to input", I + "((device float*)x)[i] = 1;\nout[i] = 0;", "x)[i] = 1"),
    "too much threadgroup memory": Broken(
        "threadgroup memory",
        L + "threadgroup float a[8000];\nthreadgroup float b[200];\na[t] = b[t] = 0;\nout[t] = 0;",
        "b[200]",
    ),
    "a device pointer given for a threadgroup pointer": Broken(
        "metal rules",
        I + "out[i] = twice(x + i);",
        header="inline float twice(const threadgroup float* p) { return *p * 2; }\n",
    ),
    "a threadgroup pointer cast to a device pointer": Broken(
        "metal rules", L + "threadgroup float s[64];\ndevice float* p = s;\np[t] = 0;\nout[t] = 0;", "p = s"
    ),
    "a float narrowed to bfloat without a cast": Broken("metal rules", I + "bfloat b = x[i];\nout[i] = b;", "bfloat b"),
    "two types in a call that Metal overloads": Broken("metal rules", I + "out[i] = max(x[i], 0);"),
    "a double": Broken("metal rules", I + "double v = x[i];\nout[i] = float(v);", "double v"),
    "a signed overflow": Broken("undefined behaviour", I + "out[i] = int(x[i]) + 0x7fffffff;", "0x7fffffff"),
    "a division by zero": Broken("undefined behaviour", I + "out[i] = 7 / int(i - i);", "7 / "),
    "a text that is not Metal": Broken("compile", "this is not Metal", "this is"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", BROKEN)
def test_the_fault_is_found(fault: str, order: Order) -> None:
    broken = BROKEN[fault]
    with pytest.raises(KernelError) as caught:
        run(
            broken.source,
            broken.inputs,
            {"out": ((broken.size,), mx.uint32 if broken.atomic else mx.float32)},
            grid=(broken.threads, 1, 1),
            threadgroup=(broken.group, 1, 1),
            header=broken.header,
            order=order,
            atomic_outputs=broken.atomic,
            init_value=broken.init_value,
            contiguous=broken.contiguous,
        )
    assert caught.value.kind == broken.kind, caught.value
    assert caught.value.kernel == "tried"
    assert broken.blamed in caught.value.text, caught.value
