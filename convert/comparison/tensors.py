"""How far the weights of two checkpoints are apart, a few megabytes of them at a time."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.layout import Plan, Target
from mlx_qwen.checkpoint.matrices import read_rows
from mlx_qwen.checkpoint.names import decoder_layer

from ..recipes.kinds import Kind, kind_of

_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorError:
    """How far tensor `name` of b is from that of a: ‖a − b‖ and ‖a‖, both unpacked, as root mean squares."""

    name: str
    kind: Kind
    parameters: int
    distance: float
    magnitude: float

    @property
    def relative(self) -> float:
        """‖a − b‖ / ‖a‖."""
        if self.magnitude:
            return self.distance / self.magnitude
        return math.inf if self.distance else 0.0

    @property
    def layer(self) -> int | None:
        """The decoder layer that the tensor belongs to, if it belongs to one."""
        return decoder_layer(self.name)


def matched(a: Plan, b: Plan) -> dict[str, tuple[Target, Target]]:
    """The tensors that both plans have, by name, in the order of `a`."""
    in_b = {target.spec.name: target for target in b.targets}
    return {target.spec.name: (target, in_b[target.spec.name]) for target in a.targets if target.spec.name in in_b}


def tensor_error(a: Target, b: Target) -> TensorError:
    """Compare two tensors of one name and shape. Values that are not finite make the error, or both, not finite."""
    distance = magnitude = 0.0
    for first, last in _blocks(a):
        exact, other = (read_rows(target, first, last, mx.float32).dense().astype(mx.float32) for target in (a, b))
        distance += sum_of_squares(exact - other)
        magnitude += sum_of_squares(exact)
    size = math.prod(a.spec.shape)
    root = [math.sqrt(total / size) for total in (distance, magnitude)]
    return TensorError(a.spec.name, kind_of(a.spec), size, root[0], root[1])


def sum_of_squares(values: mx.array) -> float:
    """Σ x² of fp32 values; not finite only if one of them is not."""
    total = float(mx.square(values).sum())
    return total if math.isfinite(total) else float(np.square(np.array(values, np.float64)).sum())


def bytes_to_read(targets: Iterable[Target]) -> int:
    """How many bytes reading each of `targets` by itself takes from disk."""
    total = 0
    for target in targets:
        total += sum(info.nbytes for info in (target.scales, target.biases) if info is not None)
        for source in target.sources:
            entries = 1 if source.index is None else source.tensor.shape[0]
            total += source.tensor.nbytes // entries
    return total


def _blocks(target: Target) -> Iterator[tuple[int, int]]:
    """Ranges of rows that take a few megabytes; a vector is one row."""
    shape = target.spec.shape
    rows = math.prod(shape[:-1])
    step = max(1, _BLOCK_BYTES // (4 * shape[-1]))
    for first in range(0, rows, step):
        yield first, min(first + step, rows)
