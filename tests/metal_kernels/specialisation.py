"""A kernel as one call compiles it."""

from dataclasses import dataclass

from tests.metal_emulator.signature import KernelSource, Signature


@dataclass(frozen=True)
class Specialisation:
    """A kernel as one call compiles it."""

    source: KernelSource
    signature: Signature
    threadgroup: tuple[int, int, int]

    @property
    def name(self) -> str:
        """The kernel's name and its template arguments."""
        return self.source.name.removeprefix("mlx_qwen_") + self.signature.template_arguments
