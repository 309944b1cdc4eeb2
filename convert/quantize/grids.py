"""Scale and bias of each group of weights: rounded as they will be stored, and searched for the least error.

A group of g weights w is stored as codes q in 0 … 2^bits − 1 and stands for scale · q + bias. MLX takes the range of
the group and makes zero one of the values; both cost precision that the search wins back.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_qwen.convert.arrays import FLOATS, rounded
from mlx_qwen.convert.settings import DType

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
    return _searched(groups, bits, dtype, importance, refits).grids()


def searched_codes(groups: Floats, bits: int, dtype: DType) -> tuple[Grids, Floats]:
    """`searched_grids` of weights that are equally important, and the nearest codes [G, g], still as floats."""
    search = _searched(groups, bits, dtype, importance=None, refits=1)
    return search.grids(), search.codes()


def _searched(groups: Floats, bits: int, dtype: DType, importance: Floats | None, refits: int) -> "_Search":
    low, high = extremes(groups)
    search = _Search(groups, bits, importance, mlx_grids(low, high, bits, dtype))
    half = (high - low) * np.float32(_STARTS.get(bits, 1.0) / 2)
    middle = (low + high) * np.float32(0.5)
    grids = stored(half * np.float32(2 / ((1 << bits) - 1)), middle - half, dtype)
    for _ in range(refits if bits <= MOST_FITTED_BITS else 0):
        grids = search.fitted(grids)
    search.visit(grids)
    return search


def extremes(groups: Floats) -> tuple[Floats, Floats]:
    """The least and the greatest weight of each group, [G, 1]; NaN where there is one."""
    # By their places, as numpy finds these several times faster than the extremes themselves.
    least, greatest = (find(groups, axis=1, keepdims=True) for find in (np.argmin, np.argmax))
    return np.take_along_axis(groups, least, axis=1), np.take_along_axis(groups, greatest, axis=1)


class _Search:
    """The best of the grids that were visited, and the sums that a least-squares fit needs."""

    def __init__(self, groups: Floats, bits: int, importance: Floats | None, first: Grids) -> None:
        self._groups = groups
        self._bits = bits
        self._importance = importance
        self._ones = np.ones(groups.shape[1], np.float32) if importance is None else importance
        self._total = self._ones.sum(axis=-1, keepdims=True)
        self._gaps, self._codes = np.empty_like(groups), np.empty_like(groups)
        self._best = Grids(first.scales.copy(), first.biases.copy(), first.dtype)
        self._error = np.full(first.scales.shape, np.inf, np.float32)
        self._is_last = np.ones(first.scales.shape, np.bool_)
        self.visit(first)

    def grids(self) -> Grids:
        """The best grid of each group."""
        return self._best

    def codes(self) -> Floats:
        """The nearest codes on the best grids, for which those of the last visit are used up."""
        others = ~self._is_last[:, 0]
        if others.any():
            grids = Grids(self._best.scales[others], self._best.biases[others], self._best.dtype)
            self._codes[others] = nearest_codes(grids.positions(self._groups[others]), self._bits)
        return self._codes

    def visit(self, grids: Grids) -> None:
        """Keep `grids` where they are the best so far."""
        self._round(grids)
        weighted = self._gaps if self._importance is None else self._gaps * self._importance
        error = _dot(weighted, self._gaps) * grids.scales**2
        self._is_last = error < self._error
        np.copyto(self._error, error, where=self._is_last)
        np.copyto(self._best.scales, grids.scales, where=self._is_last)
        np.copyto(self._best.biases, grids.biases, where=self._is_last)

    def fitted(self, grids: Grids) -> Grids:
        """Least squares of the weights on their codes, as a change of scale and bias in steps of the present scale."""
        self._round(grids)
        gaps, codes = self._gaps, self._codes
        counted = codes if self._importance is None else codes * self._importance
        q, qq = _dot(codes, self._ones), _dot(counted, codes)
        d, dq = _dot(gaps, self._ones), _dot(counted, gaps)
        determinant = self._total * qq - q * q
        slope = np.where(determinant > 0, (self._total * dq - q * d) / np.where(determinant > 0, determinant, 1), 0)
        offset = (d - slope * q) / self._total
        return stored(grids.scales * (1 + slope), grids.biases + grids.scales * offset, grids.dtype)

    def _round(self, grids: Grids) -> None:
        """Find the codes, and the gaps from them to where the weights lie."""
        grids.positions(self._groups, out=self._gaps)
        nearest_codes(self._gaps, self._bits, out=self._codes)
        np.subtract(self._gaps, self._codes, out=self._gaps)


def _dot(a: Floats, b: Floats) -> Floats:
    """Dot products of the rows, [G, 1]."""
    products: Floats = np.vecdot(a, b)
    return products[:, None]
