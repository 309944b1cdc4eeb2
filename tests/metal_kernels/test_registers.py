"""No kernel needs more registers than the threads of its threadgroups have, by the count of another GPU's compiler."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from tests.metal_emulator.registers import clang_version, count, limit, unavailable
from tests.metal_emulator.signature import KernelSource, make_signature
from tests.metal_kernels.registers import counted, shipped, table
from tests.metal_kernels.specialisation import Specialisation

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
pytestmark = pytest.mark.skipif(unavailable() is not None, reason=unavailable() or "")


def tried(source: str, most: int) -> tuple[int, int]:
    kernel = KernelSource("tried", ("x",), ("y",), source, "", True, False)
    found = count(kernel, make_signature(kernel, [mx.zeros(8)], [mx.float32], ()), (32, 1, 1), most)
    return found.count, found.spilled


def values(number: int) -> str:
    """A kernel that holds so many values at once."""
    return (
        f"float v[{number}];\nuint i = thread_position_in_grid.x;\n"
        f"#pragma unroll\nfor (int n = 0; n < {number}; ++n) v[n] = x[i * {number} + n];\n"
        "threadgroup_barrier(mem_flags::mem_device);\n"
        f"#pragma unroll\nfor (int n = 0; n < {number}; ++n) y[i * {number} + n] = v[{number - 1} - n];"
    )


def test_more_values_at_once_need_more_registers_and_then_memory() -> None:
    few, none = tried(values(40), 128)
    assert 40 <= few < 100 and none == 0
    _, spilled = tried(values(160), 128)
    assert spilled >= 4 * 32


def test_an_array_indexed_by_what_is_known_late_lies_in_memory() -> None:
    source = "float v[16];\nuint i = thread_position_in_grid.x;\nfor (int n = 0; n < 16; ++n) v[n] = x[i + n];\n"
    assert tried(source + "y[i] = v[i % 16];", 128)[1] >= 64


@pytest.mark.parametrize(("threads", "registers"), [(32, 128), (384, 128), (385, 116), (512, 104), (1024, 52)])
def test_larger_threadgroups_leave_a_thread_fewer_registers(threads: int, registers: int) -> None:
    assert limit((threads, 1, 1)) == registers


@pytest.fixture(scope="module")
def kernels() -> dict[str, Specialisation]:
    return shipped()


def test_every_kernel_keeps_its_values_in_registers(kernels: dict[str, Specialisation]) -> None:
    assert len(kernels) > 18
    found = {name: counted(made) for name, made in kernels.items()}
    assert not {name: each for name, each in found.items() if each.spilled}


def test_the_page_on_kernels_has_the_table(kernels: dict[str, Specialisation]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    counted_with = re.search(r"clang (\d+)", page)
    assert counted_with is not None
    if clang_version() != int(counted_with[1]):
        pytest.skip("another clang counts a few registers more or fewer")
    assert "\n".join(table(kernels)) in page, "python -m tests.metal_kernels.registers prints it"
