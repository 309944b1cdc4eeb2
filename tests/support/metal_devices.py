"""A Mac that nobody has: the emulator in Metal's place, told which kernels fail, how, and how long all take."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from metal_kernels import _build, tuning
from metal_kernels._choices import Choices, choose
from metal_kernels.calls import Call
from metal_kernels.tuning import Implementation
from tests.metal_emulator import emulated, metal_kernel
from tests.metal_emulator.report import Report

BUILD = "[metal::Device] Unable to build metal library from source"
LOST = "[METAL] Command buffer execution failed: Caused GPU Address Fault Error."
LIMIT = "Thread group size ({}) is greater than the maximum allowed threads per thread group ({})."
_eval = mx.eval


@dataclass
class Device:
    """What goes wrong, by the end of a kernel's name.

    Attributes:
        builds_badly: fail when they are built.
        fails_at_eval: launch, and fail when outputs are computed, as MLX's kernels do that cannot be launched.
        computes_wrongly: give twice what they should.
        most_threads: what a threadgroup may hold.
        seconds: by label of a timed call, what it takes; a kernel 1 and plain MLX 2 where none is given.
    """

    builds_badly: frozenset[str] = frozenset()
    fails_at_eval: frozenset[str] = frozenset()
    computes_wrongly: frozenset[str] = frozenset()
    most_threads: int = 1024
    seconds: Mapping[str, float] = field(default_factory=dict)
    timed: list[str] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    _coming: Exception | None = None

    def clock(self, label: str, by: Implementation, run: Call) -> float:
        """Stands in for `metal_kernels.tuning.seconds_of`."""
        mx.eval(run())
        self.timed.append(f"{label}: {by}")
        return self.seconds.get(f"{label}: {by}", 1.0 if by == "kernel" else 2.0)

    def metal_kernel(self, name: str, **described: Any) -> Any:
        """Stands in for `mx.fast.metal_kernel`."""
        kernel = metal_kernel(name, **described)

        def launch(**call: Any) -> list[mx.array]:
            self.launched.append(name)
            if _is_among(name, self.builds_badly):
                self._coming = RuntimeError(BUILD)
            threads = int(np.prod(call["threadgroup"]))
            if threads > self.most_threads:
                self._coming = ValueError(LIMIT.format(threads, self.most_threads))
            if _is_among(name, self.fails_at_eval):
                self._coming = RuntimeError(LOST)
            # The emulator computes its inputs at once, which says nothing of what the device does.
            with patch.object(mx, "eval", _eval):
                outputs = kernel(**call)
            if _is_among(name, self.computes_wrongly):
                return [output + output for output in outputs]
            return outputs

        return launch

    def evaluated(self, *arrays: Any) -> None:
        """Stands in for `mx.eval` and `mx.async_eval`: what was launched in vain fails here."""
        if self._coming is not None:
            coming, self._coming = self._coming, None
            raise coming
        _eval(*arrays)


def _is_among(name: str, ends: frozenset[str]) -> bool:
    return any(name.endswith(end) for end in ends)


@contextmanager
def running_on(device: Device) -> Iterator[Report]:
    """Everything between runs as if on a Mac with this device, whose kernels nobody has tried yet."""
    _build._built.cache_clear()
    choose(Choices())
    try:
        with (
            emulated() as report,
            patch.object(mx.fast, "metal_kernel", device.metal_kernel),
            # What takes a GPU a moment takes the emulator a minute.
            patch.object(tuning, "LONG_CONTEXT", 300),
            patch.object(mx, "eval", device.evaluated),
            patch.object(mx, "async_eval", device.evaluated),
            patch.object(mx.metal, "is_available", lambda: True),
            patch.object(mx, "set_wired_limit", lambda size: 0),
            patch.object(
                mx, "device_info", lambda: {"device_name": "Apple M0", "max_recommended_working_set_size": 16 << 30}
            ),
            patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        ):
            yield report
    finally:
        choose(Choices())
        _build._built.cache_clear()
