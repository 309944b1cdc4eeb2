"""Scale and bias of each group of weights: rounded as they will be stored, and searched for the least error.

A group of g weights w is stored as codes q in 0 … 2^bits − 1 and stands for scale · q + bias. MLX takes the range of
the group and makes zero one of the values; both cost precision that the search wins back.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import FLOATS, rounded
from ..settings import DType

Floats = npt.NDArray[np.float32]

# The share of a group's range at which the search starts: few codes serve a group better without its extremes.
_STARTS = {2: 0.65, 3: 0.87, 4: 0.96, 5: 0.99}
# Above this, a code's own rounding is too small for a fit to gain anything.
MOST_FITTED_BITS = 6
_LEAST_SCALE = np.float32(1e-7)


@dataclass(frozen=True, slots=True)
class Grids:
    """Scale and bias of G groups, each fp32 [G, 1] with values that `dtype` holds exactly."""

    scales: Floats
    biases: Floats
    dtype: DType

    @property
    def parts(self) -> tuple[Floats, Floats]:
        """Scales and biases."""
        return self.scales, self.biases

    def positions(self, groups: Floats, out: Floats | None = None) -> Floats:
        """Where each weight [G, g] lies between the codes, as a real number."""
        inverse = np.divide(1, self.scales, out=np.zeros_like(self.scales), where=self.scales != 0)
        found = np.multiply(groups, inverse, out=out)
        found -= self.biases * inverse
        return found


def stored(scales: Floats, biases: Floats, dtype: DType) -> Grids:
    """Grids of scales and biases as they are once written in `dtype`."""
    return Grids(rounded(scales, FLOATS[dtype]), rounded(biases, FLOATS[dtype]), dtype)


def nearest_codes(positions: Floats, bits: int, out: Floats | None = None) -> Floats:
    """The codes, still as floats, that are nearest to `positions`."""
    codes = np.rint(positions, out=out)
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    return codes


def mlx_grids(low: Floats, high: Floats, bits: int, dtype: DType) -> Grids:
    """What `mx.quantize` chooses for groups whose least and greatest weights are `low` and `high`, each [G, 1].

    The edge farther from zero becomes a value exactly, and the scale is such that zero is one too.
    """
    downward = np.abs(low) > np.abs(high)
    scales = np.maximum((high - low) / np.float32((1 << bits) - 1), _LEAST_SCALE)
    scales = np.where(downward, scales, -scales)
    edges = np.where(downward, low, high)
    steps = np.rint(edges / scales)
    crossed = steps != 0
    scales = np.where(crossed, edges / np.where(crossed, steps, 1), scales)
    return stored(scales, np.where(crossed, edges, np.float32(0)), dtype)


def searched_grids(groups: Floats, bits: int, dtype: DType, importance: Floats | None = None, refits: int = 1) -> Grids:
    """The grids that lose least of those that the search visits, never more than `mlx_grids` would.

    The search takes a share of the range, picks codes, fits scale and bias to them by least squares, and repeats.

    Args:
        groups: weights [G, g].
        bits: of a code.
        dtype: what scales and biases are stored in; the error is that of the stored values.
        importance: how much a column's squared error counts, [g] or [G, g]; all the same by default.
        refits: how often scale and bias are fitted to the codes: the first time brings most.
    """
    low, high = extremes(groups)
    first, found = mlx_grids(low, high, bits, dtype), _narrowed(low, high, bits, dtype)
    rounding = _Rounding(groups, bits, importance)
    if bits > MOST_FITTED_BITS:
        refits = 0
    error = rounding.error(found) if refits == 0 else np.float32(np.inf)
    for _ in range(refits):
        found, error = rounding.fitted(found)
    # A scale that the dtype rounds to zero leaves no codes, and an error in steps of it says nothing.
    better = (found.scales != 0) & (error < rounding.error(first))
    scales, biases = (np.where(better, *pair) for pair in zip(found.parts, first.parts, strict=True))
    return Grids(scales, biases, dtype)


def rounding_errors(groups: Floats, grids: Grids, bits: int, importance: Floats | None = None) -> Floats:
    """The sum of squared errors of each group [G, g] with the nearest codes of its grid, [G, 1].

    `importance` is how much a weight's squared error counts, as in `searched_grids`.
    """
    return _Rounding(groups, bits, importance).error(grids)


def extremes(groups: Floats) -> tuple[Floats, Floats]:
    """The least and the greatest weight of each group, [G, 1]; NaN where there is one."""
    # By their places, as numpy finds these several times faster than the extremes themselves.
    every = np.arange(len(groups))
    return groups[every, groups.argmin(axis=1)][:, None], groups[every, groups.argmax(axis=1)][:, None]


def _narrowed(low: Floats, high: Floats, bits: int, dtype: DType) -> Grids:
    """Where the search starts: the range of each group without its ends."""
    half = (high - low) * np.float32(_STARTS.get(bits, 1.0) / 2)
    middle = (low + high) * np.float32(0.5)
    return stored(half * np.float32(2 / ((1 << bits) - 1)), middle - half, dtype)


class _Rounding:
    """Groups [G, g] rounded to the codes of one grid after the other, in the same memory."""

    def __init__(self, groups: Floats, bits: int, importance: Floats | None) -> None:
        self._groups = groups
        self._bits = bits
        self._importance = importance
        self._ones = np.ones(groups.shape[1], np.float32) if importance is None else importance
        self._total = self._ones.sum(axis=-1, keepdims=True)
        self._gaps, self._codes = np.empty_like(groups), np.empty_like(groups)

    def error(self, grids: Grids) -> Floats:
        """The weighted sum of squared errors of each group, [G, 1]."""
        self._round(grids)
        return _dot(self._weighted(self._gaps), self._gaps) * grids.scales**2

    def fitted(self, grids: Grids) -> tuple[Grids, Floats]:
        """Least squares of the weights on their codes, and the error with these codes, above that with the nearest.

        Both scale and bias are found as changes, in steps of the present scale.
        """
        self._round(grids)
        gaps, codes = self._gaps, self._codes
        q, d = _dot(codes, self._ones), _dot(gaps, self._ones)
        weighted = self._weighted(codes)
        qq, dq = _dot(weighted, codes), _dot(weighted, gaps)
        dd = _dot(self._weighted(gaps), gaps)
        determinant = self._total * qq - q * q
        slope = np.where(determinant > 0, (self._total * dq - q * d) / np.where(determinant > 0, determinant, 1), 0)
        offset = (d - slope * q) / self._total
        found = stored(grids.scales * (1 + slope), grids.biases + grids.scales * offset, grids.dtype)
        # What storing made of the changes.
        step = np.where(grids.scales != 0, grids.scales, 1)
        slope, offset = (found.scales - grids.scales) / step, (found.biases - grids.biases) / step
        change = slope * (slope * qq - 2 * dq) + offset * (self._total * offset - 2 * d + 2 * slope * q)
        return found, (dd + change) * grids.scales**2

    def _weighted(self, values: Floats) -> Floats:
        return values if self._importance is None else values * self._importance

    def _round(self, grids: Grids) -> None:
        """Find the codes, and the gaps from them to where the weights lie."""
        grids.positions(self._groups, out=self._gaps)
        nearest_codes(self._gaps, self._bits, out=self._codes)
        np.subtract(self._gaps, self._codes, out=self._gaps)


def _dot(a: Floats, b: Floats) -> Floats:
    """Dot products of the rows, [G, 1]."""
    products: Floats = np.vecdot(a, b)
    return products[:, None]
