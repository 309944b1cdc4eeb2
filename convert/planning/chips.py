"""Apple's chips, by their published specifications."""

import re
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Chip:
    """One chip.

    Attributes:
        name: as Apple calls it, with the GPU's cores where versions differ in bandwidth.
        bandwidth: of the memory, in 10^9 bytes a second.
        gpu_cores: of the largest version with this bandwidth.
        tflops: of the GPU in fp32, in 10^12 operations a second, which is its fp16 rate too on M1 and M2. Apple has
            published none since M3, where fp16 is faster than fp32; None there.
        unconfirmed: which of these figures no second source was found for.
    """

    name: str
    bandwidth: float
    gpu_cores: int
    tflops: float | None = None
    unconfirmed: tuple[str, ...] = ()

    @property
    def has_bf16(self) -> bool:
        """Whether the GPU computes with bf16 itself; M1 and M2 convert every number, so that fp16 is faster there."""
        return self.name.split()[0] not in ("M1", "M2")


_BANDWIDTH, _RATE = ("bandwidth",), ("tflops",)  # the rates of larger M2 follow from M2's, core by core
CHIPS = (
    Chip("M1", 68.25, 8, 2.6),
    Chip("M1 Pro", 200, 16, 5.2),
    Chip("M1 Max", 400, 32, 10.4),
    Chip("M1 Ultra", 800, 64, 21),
    Chip("M2", 100, 10, 3.6),
    Chip("M2 Pro", 200, 19, 6.8, _RATE),
    Chip("M2 Max", 400, 38, 13.6, _RATE),
    Chip("M2 Ultra", 800, 76, 27.2, _RATE),
    Chip("M3", 100, 10),
    Chip("M3 Pro", 150, 18),
    Chip("M3 Max 30-core", 300, 30),
    Chip("M3 Max", 400, 40),
    Chip("M3 Ultra", 819, 80),
    Chip("M4", 120, 10),
    Chip("M4 Pro", 273, 20),
    Chip("M4 Max 32-core", 410, 32, unconfirmed=_BANDWIDTH),
    Chip("M4 Max", 546, 40),
    Chip("M5", 153, 10),
    Chip("M5 Pro", 307, 20),
    Chip("M5 Max 32-core", 460, 32, unconfirmed=_BANDWIDTH),
    Chip("M5 Max", 614, 40),
)
CHIP_NAMES = tuple(chip.name for chip in CHIPS)


def chip_named(name: str) -> Chip | None:
    """The chip of this name, however it is spaced, with or without "Apple"; None for a name that is not in `CHIPS`."""
    wanted = _folded(name).removeprefix("apple")
    return next((chip for chip in CHIPS if _folded(chip.name) == wanted), None)


def this_chip() -> Chip | None:
    """The chip of this machine; None without a Metal GPU, and for one that is newer than `CHIPS`."""
    return chip_named(str(mx.device_info()["device_name"])) if mx.metal.is_available() else None


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
