"""What the inputs of a layer's matrices have in common: their second moments, and the corrections that follow."""

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from threading import Lock

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ..arrays import as_float32
from ..layerwise import LinearInput
from .correction import DAMPING, Correction, column_blocks, correction
from .scales import Floats

# An expert leans on what all experts of its layer see as if it were this share of its columns in tokens.
_SHARED_TOKENS = 1 / 16
_MOST_SHARED_ROWS = 4096
# Enough for the experts that a few threads work on, as gate and up of one expert follow each other.
REMEMBERED = 6

Moments = list[npt.NDArray[np.floating]]


@dataclass(slots=True)
class _Routed:
    """Rows by expert, one batch after the other, and which tensors they enter."""

    seen: list[LinearInput] = field(default_factory=list)

    def moments(self, expert: int, shared: Moments) -> Moments:
        rows = np.concatenate([as_float32(batch.of_expert(expert)) for batch in self.seen])
        return [own + everyone for own, everyone in zip(_moments(rows), shared, strict=True)]

    def shared(self) -> Moments:
        """Moments of a sample of the rows of all experts, for the weight of a few tokens."""
        total = sum(batch.x.shape[0] for batch in self.seen)
        step = -(-total // _MOST_SHARED_ROWS)
        rows = np.concatenate([as_float32(batch.x[::step]) for batch in self.seen])
        weight = rows.shape[1] * _SHARED_TOKENS / len(rows)
        return [block * np.float32(weight) for block in _moments(rows)]


class LayerInputs:
    """An observer of one layer that keeps what the corrections of the tensors `wanted` need.

    `damping` is that of `correction`. Memory is one [K, K] a group of matrices that read the same rows, and for experts
    the rows themselves.
    """

    def __init__(self, wanted: Collection[str], damping: float = DAMPING) -> None:
        self._wanted = wanted
        self._damping = damping
        self._groups: dict[str, str] = {}
        self._dense: dict[str, Moments] = {}
        self._routed: dict[str, _Routed] = {}

    def __call__(self, seen: LinearInput) -> None:
        """Take note of some rows."""
        names = [name for name in seen.names if name in self._wanted]
        if not names:
            return
        self._groups |= dict.fromkeys(names, names[0])
        if seen.experts is not None:
            mx.eval(seen.x, seen.experts)
            self._routed.setdefault(names[0], _Routed()).seen.append(seen)
            return
        new = _moments(as_float32(seen.x))
        if names[0] not in self._dense:
            self._dense[names[0]] = new
            return
        for total, more in zip(self._dense[names[0]], new, strict=True):
            np.add(total, more, out=total)

    def corrections(self) -> "Corrections":
        """How to correct every tensor that was seen."""
        return Corrections(self._groups, self._dense, self._routed, self._damping)


class Corrections:
    """Corrections of one layer's tensors, each made when it is first asked for; safe to ask in any thread."""

    def __init__(
        self, groups: dict[str, str], dense: dict[str, Moments], routed: dict[str, _Routed], damping: float
    ) -> None:
        self._groups, self._dense, self._routed, self._damping = groups, dense, routed, damping
        self._shared = {name: rows.shared() for name, rows in routed.items()}
        self._made: OrderedDict[tuple[str, int | None], Correction] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._groups

    def of(self, name: str, expert: int | None = None) -> Correction:
        """The correction of a tensor that was seen, or of one expert's matrix in it."""
        group = self._groups[name]
        return self._remembered((group, expert), lambda: correction(self._moments(group, expert), self._damping))

    def _moments(self, group: str, expert: int | None) -> Moments:
        if expert is None:
            return self._dense[group]
        return self._routed[group].moments(expert, self._shared[group])

    def _remembered(self, key: tuple[str, int | None], make: Callable[[], Correction]) -> Correction:
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            while len(self._made) > REMEMBERED:
                self._made.popitem(last=False)
            return self._made[key]


def _moments(rows: Floats) -> Moments:
    """Σ x xᵀ of rows [n, K], by blocks of columns."""
    return [rows[:, block].T @ rows[:, block] for block in column_blocks(rows.shape[1])]
