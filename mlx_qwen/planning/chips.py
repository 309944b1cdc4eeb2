"""Apple's chips, and how much of a machine's memory a model may take."""

import os
import re
from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.planning.errors import PlanningError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip, by Apple's published specifications.

    Attributes:
        name: as Apple calls it, with the GPU's cores where versions differ in bandwidth.
        bandwidth: of the memory, in 10^9 bytes a second.
        gpu_cores: of the largest version with this bandwidth.
        tflops: of the GPU in fp32, in 10^12 operations a second, which is its fp16 rate too on M1 and M2. Apple has
            published none since M3, where fp16 is faster than fp32; None there.
    """

    name: str
    bandwidth: float
    gpu_cores: int
    tflops: float | None = None


CHIPS = (
    Chip("M1", 68.25, 8, 2.6),
    Chip("M1 Pro", 200, 16, 5.2),
    Chip("M1 Max", 400, 32, 10.4),
    Chip("M1 Ultra", 800, 64, 21),
    Chip("M2", 100, 10, 3.6),
    Chip("M2 Pro", 200, 19, 6.8),
    Chip("M2 Max", 400, 38, 13.6),
    Chip("M2 Ultra", 800, 76, 27.2),
    Chip("M3", 100, 10),
    Chip("M3 Pro", 150, 18),
    Chip("M3 Max 30-core", 300, 30),
    Chip("M3 Max", 400, 40),
    Chip("M3 Ultra", 819, 80),
    Chip("M4", 120, 10),
    Chip("M4 Pro", 273, 20),
    Chip("M4 Max 32-core", 410, 32),
    Chip("M4 Max", 546, 40),
    Chip("M5", 153, 10),
    Chip("M5 Pro", 307, 20),
    Chip("M5 Max 32-core", 460, 32),
    Chip("M5 Max", 614, 40),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory` in bytes, how much of it a model may take, and the chip, if it is known."""

    memory: int
    usable: int
    chip: Chip | None


def machine(chip: str | None, memory: int | str | None) -> Machine:
    """The machine asked for, or this one when nothing is asked.

    A Mac's GPU may take two thirds of up to 32 GiB, and three quarters of more, as macOS sets it by default; this
    machine is asked for its own limit. Without a Metal GPU all memory counts.

    Raises:
        PlanningError: the chip is unknown, the memory no size, or a chip is named without its memory.
    """
    if chip is None and memory is None:
        return _this_machine()
    named = None if chip is None else chip_named(chip)
    if memory is None:
        raise PlanningError(f"The {chip} comes with several sizes of memory. Say which, such as --memory 64GB.")
    size = memory_bytes(memory)
    return Machine(size, size * 2 // 3 if size <= 32 * GIB else size * 3 // 4, named)


def chip_named(name: str) -> Chip:
    """The chip of this name, however it is spaced, with or without "Apple"; raises PlanningError with all names."""
    wanted = _folded(name).removeprefix("apple")
    for chip in CHIPS:
        if _folded(chip.name) == wanted:
            return chip
    raise PlanningError(f"{name!r} is no chip of the table, expected one of {', '.join(chip.name for chip in CHIPS)}.")


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def memory_bytes(memory: int | str) -> int:
    """Bytes of a memory size: a number of bytes, or text such as "64GB", which is 64 · 2^30 as memory is sold."""
    if isinstance(memory, int):
        size = memory
    else:
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*Gi?B\s*", memory, re.IGNORECASE)
        if found is None:
            raise PlanningError(f"memory is {memory!r}, expected a size such as 64GB.")
        size = int(float(found[1]) * GIB)
    if size <= 0:
        raise PlanningError(f"memory is {memory!r}, expected more than nothing, such as 64GB.")
    return size


def _this_machine() -> Machine:
    info = mx.device_info()
    if not mx.metal.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Machine(memory, memory, None)
    try:
        chip: Chip | None = chip_named(str(info["device_name"]))
    except PlanningError:  # newer than the table
        chip = None
    return Machine(int(info["memory_size"]), int(info["max_recommended_working_set_size"]), chip)
