"""How much of a machine's memory a model may take."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.errors import PlanningError
from mlx_qwen.machine import machine_bytes, memory_bytes
from mlx_qwen.sizes import GIB

from .chips import CHIP_NAMES, Chip, chip_named, this_chip


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory` in bytes, how much of it a model may take, and the chip, if it is known."""

    memory: int
    usable: int
    chip: Chip | None


def machine(chip: str | None, memory: int | str | None) -> Machine:
    """The machine asked for, or this one when nothing is asked.

    A Mac's GPU may take two thirds of up to 32 GiB, and three quarters of more, as macOS has set it by default; recent
    versions allow some more (74 % of 24 GiB and 84 % of 128 were reported), which is left as a reserve. This machine is
    asked for its own limit. Without a Metal GPU all memory counts.

    Raises:
        PlanningError: the chip is unknown, the memory no size, or a chip is named without its memory.
    """
    if chip is None and memory is None:
        return _this_machine()
    named = None if chip is None else _known_chip(chip)
    if memory is None:
        raise PlanningError(f"The {chip} comes with several sizes of memory. Say which, such as --memory 64GB.")
    size = memory_bytes(memory, PlanningError)
    return Machine(size, size * 2 // 3 if size <= 32 * GIB else size * 3 // 4, named)


def _known_chip(name: str) -> Chip:
    chip = chip_named(name)
    if chip is None:
        raise PlanningError(f"{name!r} is no chip of the table, expected one of {', '.join(CHIP_NAMES)}.")
    return chip


def _this_machine() -> Machine:
    info = mx.device_info()
    if not mx.metal.is_available():
        return Machine(machine_bytes(), machine_bytes(), None)
    return Machine(int(info["memory_size"]), int(info["max_recommended_working_set_size"]), this_chip())
