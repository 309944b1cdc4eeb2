"""Rounding a matrix column by column, each column making up for the errors of those before it.

What counts is not the error E of the weights but that of the layer's output, E xᵀ, whose mean square over inputs x is
tr(E H Eᵀ) with the inputs' second moments H. With H = F D Fᵀ, F unit upper triangular, that is Σ_j D_j |(E F)_j|², and
column j of E F is smallest when w_j is rounded from where the errors of earlier columns leave it: from
w_j + Σ_{i<j} e_i F_ij.

Source: Frantar et al., "GPTQ" (2022), in the form of Chee et al., "QuIP" (2023), which needs no inverse.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Quantization

from ..settings import DType
from .packing import packed
from .rows import PackedRows
from .scales import Floats, nearest_codes, searched_grids

DAMPING = 0.01
# Beyond this many columns, which take 0.5 GB in fp64, errors are made up for within blocks of columns only.
MOST_COLUMNS = 8192
_BLOCK_STEP = 128
_REFITS = 3


@dataclass(frozen=True, slots=True)
class Correction:
    """Feedback F − 1 and importance D of one block of columns after the other; see the module's text."""

    feedback: tuple[Floats, ...]
    importance: tuple[Floats, ...]


def column_blocks(columns: int) -> list[slice]:
    """Equal blocks of at most MOST_COLUMNS, each a multiple of 128 columns but for the last."""
    count = -(-columns // MOST_COLUMNS)
    step = -(-columns // count // _BLOCK_STEP) * _BLOCK_STEP
    return [slice(first, min(first + step, columns)) for first in range(0, columns, step)]


def correction(moments: list[npt.NDArray[np.floating]], damping: float = DAMPING) -> Correction:
    """How to correct a matrix whose inputs have these second moments.

    Args:
        moments: Σ x xᵀ of the inputs, symmetric [K', K'] for each of `column_blocks`, of any scale.
        damping: what share of its mean is added to the diagonal, so that few or dependent inputs do no harm.
    """
    feedback, importance = [], []
    for block in moments:
        damped = block.astype(np.float64)
        diagonal = np.einsum("ii->i", damped)
        diagonal += damping * diagonal.mean() or 1.0
        # Reversed, Cholesky's lower factor becomes the upper one that is wanted.
        factor = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
        spread = np.diagonal(factor)
        feedback.append(np.triu(factor / spread, 1).astype(np.float32))
        importance.append((spread**2).astype(np.float32))
    return Correction(tuple(feedback), tuple(importance))


def corrected_rows(rows: Floats, precision: Quantization, dtype: DType, how: Correction) -> PackedRows:
    """Pack rows [R, K] so that the output of their matrix, rather than the weights, changes least.

    Scales and biases are searched group by group, when the columns before them are done, weighted by importance.
    """
    codes, scales, biases = [], [], []
    for block, feedback, importance in zip(column_blocks(rows.shape[1]), how.feedback, how.importance, strict=True):
        weights = np.ascontiguousarray(rows[:, block].T)
        errors = np.zeros_like(weights)
        for first in range(0, len(weights), precision.group_size):
            group = slice(first, first + precision.group_size)
            targets = weights[group] + feedback[:first, group].T @ errors[:first]
            grids = searched_grids(np.ascontiguousarray(targets.T), precision.bits, dtype, importance[group], _REFITS)
            scales.append(grids.scales)
            biases.append(grids.biases)
            codes.append(
                _round_group(weights, errors, targets, feedback, group, (scales[-1], biases[-1]), precision.bits)
            )
    words = packed(np.ascontiguousarray(np.concatenate(codes).T), precision.bits)
    return PackedRows(words, np.concatenate(scales, axis=1), np.concatenate(biases, axis=1), dtype)


def _round_group(
    weights: Floats,
    errors: Floats,
    targets: Floats,
    feedback: Floats,
    group: slice,
    grid: tuple[Floats, Floats],
    bits: int,
) -> npt.NDArray[np.uint8]:
    """Round columns `group` one after the other: their codes [g, R]; `errors` [K, R] are filled in."""
    scale, bias = (part[:, 0] for part in grid)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    codes = np.empty(targets.shape, np.uint8)
    for j, column in enumerate(range(group.start, group.stop)):
        target = targets[j] + feedback[group.start : column, column] @ errors[group.start : column]
        code = nearest_codes((target - bias) * inverse, bits)
        errors[column] = weights[column] - (code * scale + bias)
        codes[j] = code
    return codes
