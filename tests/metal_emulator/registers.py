"""How many registers a kernel needs, by a stand-in: clang's code for a GPU of 32 lanes a wave whose compiler is open.

No compiler for Apple's GPUs runs here. Counts are those of vector registers; what is the same in all lanes lies in
others there. The limits are of Apple's M1 and M2, by Mesa's driver (src/asahi/compiler/agx_performance.c).
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from shlex import split

from tests.metal_emulator.compiler import RUNTIME, plain_clang, run, written
from tests.metal_emulator.signature import KernelSource, Signature
from tests.metal_emulator.translate import gpu_unit

_TARGET = split(
    "-target amdgcn-amd-amdhsa -mcpu=gfx1030 -std=c++17 -O2 -S -w -nogpulib -ffreestanding -fno-exceptions -fno-rtti "
    "-fno-math-errno -ffp-contract=off -mllvm -inline-threshold=1000000 "
    # What is indexed late lies in memory on Apple's GPUs.
    "-mllvm -disable-promote-alloca-to-vector -mllvm -disable-promote-alloca-to-lds"
)
# By the most threads of a threadgroup: 32-bit registers that each can have.
_LIMITS = {
    **{384: 128, 448: 116, 512: 104, 576: 92, 640: 80},
    **{704: 72, 768: 68, 832: 64, 896: 56, 1024: 52},
}


@dataclass(frozen=True)
class Registers:
    """Vector registers that a kernel takes, and bytes of memory a thread that stand in for more of them."""

    count: int
    spilled: int


@cache
def unavailable() -> str | None:
    """Why nothing can be counted, or None: the compiler must have the stand-in's target."""
    try:
        targets = subprocess.run(
            [*plain_clang(), "--print-targets"], capture_output=True, text=True, check=False
        ).stdout
    except (OSError, RuntimeError) as error:
        return str(error)
    return None if "amdgcn" in targets else f"{' '.join(plain_clang())} has no amdgcn target: pip install ziglang"


def clang_version() -> int:
    """The major version of the clang that counts."""
    text = subprocess.run([*plain_clang(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"clang version (\d+)", text)
    assert found is not None, "clang says its version"
    return int(found[1])


def limit(threadgroup: tuple[int, int, int]) -> int:
    """Registers that each thread of a threadgroup of this size can have."""
    return next(registers for threads, registers in _LIMITS.items() if prod(threadgroup) <= threads)


def count(kernel: KernelSource, signature: Signature, threadgroup: tuple[int, int, int], most: int) -> Registers:
    """Compile a specialisation for the stand-in, with at most `most` registers a thread."""
    x, y, z = threadgroup
    defined = [f"-DGROUP_{axis}={size}" for axis, size in zip("XYZ", (x, y, z), strict=True)]
    with tempfile.TemporaryDirectory() as work:
        source = written(Path(work) / "unit.cpp", gpu_unit(kernel, signature, prod(threadgroup), most))
        target = Path(work) / "unit.s"
        run([*plain_clang(), *_TARGET, *defined, f"-I{RUNTIME / 'registers'}", source, "-o", str(target)])
        assembly = target.read_text()
    return Registers(_noted(assembly, "vgpr_count"), _noted(assembly, "private_segment_fixed_size"))


def _noted(assembly: str, name: str) -> int:
    found = re.search(rf"^\s+\.{name}:\s+(\d+)$", assembly, re.MULTILINE)
    assert found is not None, f"clang notes {name} of every kernel"
    return int(found[1])
