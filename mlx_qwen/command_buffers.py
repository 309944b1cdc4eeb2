"""How much MLX puts into one command buffer on a Mac, set before MLX reads it, and never over the user's own.

MLX commits a command buffer after so many operations, or when the arrays that they read have more than so many times
2^20 elements. Its own limits of 40 or 50 suit small models: the experts of one layer exceed them, and the GPU waits at
every commit. MLX reads both variables once, with its first operation (`metal::Device` of MLX 0.32).
"""

import os
import re
from typing import NamedTuple

from mlx_qwen.machine import chip_name, machine_bytes
from mlx_qwen.version import installed

VARIABLES = ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")
SWITCH = "MLX_QWEN_COMMAND_BUFFERS"
# Larger ones were measured flat or slower from the M5 on (mlxcel 353, 360), and level off near these (vllm-metal 578).
_LAST_GENERATION = 4
_OPERATIONS, _MOST_MEGABYTES = 1000, 1024
# What a buffer reads stays in memory until it is done: a 64th of the memory in arrays of 16 bits.
_MEGABYTES_PER_GIB = 8
_ours: dict[str, str] = {}


class Limits(NamedTuple):
    """Operations in a command buffer, and 2^20 elements of what they read, at most."""

    operations: int
    megabytes: int


def set_limits() -> None:
    """Set the variables that the user has not: to what was measured here, or what suits the chip.

    Nothing is set off Apple silicon, nor where `MLX_QWEN_COMMAND_BUFFERS` is 0, and MLX's own limits then hold.
    """
    if os.environ.get(SWITCH) == "0":
        return
    chip = chip_name()
    limits = _measured(chip, suited(chip, machine_bytes())) if chip else None
    for name, value in zip(VARIABLES, limits or (), strict=False):
        if name not in os.environ:
            os.environ[name] = _ours[name] = str(value)


def suited(chip: str, memory: int) -> Limits | None:
    """What suits a chip with so many bytes of memory by public measurements; None for MLX's own limits."""
    generation = re.match(r"Apple M(\d+)", chip)
    if generation is None or int(generation[1]) > _LAST_GENERATION:
        return None
    return Limits(_OPERATIONS, _megabytes(memory))


def candidates(chip: str, memory: int) -> list[Limits | None]:
    """What is worth measuring on a machine: MLX's own limits, and others that its memory allows."""
    most = _megabytes(memory)
    tried = [Limits(200, most // 2), Limits(_OPERATIONS, most // 2), Limits(_OPERATIONS, most)]
    return [None, *tried] if chip else [None]


def users_own() -> dict[str, str]:
    """The variables that were there before `set_limits`."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ and name not in _ours}


def environment(limits: Limits | None) -> dict[str, str]:
    """This process's environment for another, in which `limits` hold, or MLX's own."""
    left = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    given = {} if limits is None else {name: str(value) for name, value in zip(VARIABLES, limits, strict=True)}
    return {**left, **given, SWITCH: "0"}


def as_users_have_it() -> dict[str, str]:
    """This process's environment as it was, for programs that choose for themselves."""
    return {name: value for name, value in os.environ.items() if name not in _ours} | {SWITCH: "0"}


def facts() -> list[tuple[str, str]]:
    """Both limits that hold here, and where each is from; none where MLX has no command buffers of Metal."""
    if not chip_name():
        return []
    names = ("ops a command buffer", "MB a command buffer")
    kinds = dict.fromkeys(users_own(), "set by you") | dict.fromkeys(_ours, "set by mlx-qwen")
    shown = (f"{os.environ[name]}, {kinds[name]}" if name in kinds else "MLX's own" for name in VARIABLES)
    return list(zip(names, shown, strict=True))


def remember_limits(limits: Limits | None) -> bool:
    """Have processes that start later on this machine use `limits`; returns whether that was possible."""
    from mlx_qwen.remembered import remember

    operations, megabytes = limits or (0, 0)
    return remember(_name(chip_name()), {"operations": operations, "megabytes": megabytes})


def _megabytes(memory: int) -> int:
    return min(_MOST_MEGABYTES, _MEGABYTES_PER_GIB * max(8, round(memory / 2**30)))


def _measured(chip: str, otherwise: Limits | None) -> Limits | None:
    from mlx_qwen.remembered import recall  # where there is no such chip, starting does not wait for it

    found = recall(_name(chip))
    values = [found.get(name) for name in Limits._fields]
    if not all(type(value) is int and value >= 0 for value in values):
        return otherwise
    operations, megabytes = (int(value or 0) for value in values)
    return Limits(operations, megabytes) if operations and megabytes else None


def _name(chip: str) -> str:
    import hashlib

    key = f"{chip}, {machine_bytes()}, MLX {installed('mlx')}"
    return f"command-buffers/{hashlib.sha256(key.encode()).hexdigest()[:24]}"
