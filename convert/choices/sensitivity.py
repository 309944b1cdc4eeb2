"""How much each matrix loses at each precision, measured on rows of its weights."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.layout import Quantization, Target
from mlx_qwen.checkpoint.names import Role, TensorSpec, decoder_layer

from ..arrays import as_float32
from ..outputs import Output
from ..progress import Progress
from ..quantize.scales import Floats, extremes, mlx_grids, rounding_errors
from ..recipes.kinds import Kind, kind_of
from ..work.pieces import Piece, dense_values, is_finite, sound_values
from ..workers import piece_count

SAMPLED_ROWS = 256
_BLOCK_ROWS = 8
_EXPECTED_SHAPE = (32, 2048)
_TINY = 1e-30

# What the same relative error costs in a matrix of each kind, beside one of the experts: how far the predictions of a
# small trained model of this family diverged when one kind alone was packed, with attention raised to where public
# studies of the released sizes have it.
KIND_WEIGHTS: dict[Kind, float] = {
    Kind.ATTENTION_IN: 2.0,
    Kind.ATTENTION_OUT: 2.0,
    Kind.LINEAR_IN: 4.0,
    Kind.LINEAR_OUT: 6.0,
    Kind.MLP: 2.0,
    Kind.EXPERT: 1.0,
    Kind.SHARED_EXPERT: 1.0,
    Kind.ROUTER: 4.0,
    Kind.MTP: 0.5,
    # Of these for each layer of the model: the error of a layer is one of many that add up, theirs is not.
    Kind.EMBEDDING: 4.0,
    Kind.HEAD: 4.0,
}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The harm that a matrix does at each precision: its squared relative error times the weight of its kind."""

    target: Target
    harm: Mapping[Quantization | None, float]


def measure(
    targets: Iterable[Target],
    choices: tuple[Quantization, ...],
    *,
    importance: Mapping[str, mx.array] | None = None,
    progress: bool | None = None,
) -> list[Sensitivity]:
    """The harm of each matrix at each of `choices`; None, unpacked, does none.

    Reads 256 rows of each matrix, in blocks of eight spread evenly over all its rows (of all experts): enough for an
    error that thousands of groups share. The error is that of rounding to the nearest code as MLX does,
    Σ h (w − packed w)² / Σ h w².

    Args:
        targets: matrices.
        choices: precisions whose groups divide the columns of all of them.
        importance: by the name of a tensor, the squares of each of its inputs added up as h [K]; 1 for all others.
        progress: show a line of progress; by default on a terminal and in a notebook.
    """
    targets = list(targets)
    squares, weights = importance or {}, harm_weights([target.spec for target in targets])
    mx.eval(list(squares.values()))  # here, as threads cannot evaluate what another one began

    def harm_of(target: Target) -> Sensitivity:
        weight, h = weights[target.spec.name], squares.get(target.spec.name)
        errors = _errors(sampled_rows(target), choices, h)
        return Sensitivity(target, {None: 0.0, **{choice: weight * error for choice, error in errors.items()}})

    measured = []
    read = [4 * target.spec.shape[-1] * min(SAMPLED_ROWS, prod(target.spec.shape[:-1])) for target in targets]
    with Progress(sum(read), progress, verb="Measuring") as line, ThreadPoolExecutor(piece_count()) as pool:
        for nbytes, each in zip(read, pool.map(harm_of, targets), strict=True):
            measured.append(each)
            line.advance(nbytes)
    return measured


def expect(targets: Iterable[Target], choices: tuple[Quantization, ...]) -> list[Sensitivity]:
    """The harm that `measure` finds where weights are normally distributed, as those of trained matrices nearly are."""
    targets = list(targets)
    rows = mx.random.normal(_EXPECTED_SHAPE, key=mx.random.key(0))
    errors, weights = _errors(rows, choices, None), harm_weights([target.spec for target in targets])
    return [
        Sensitivity(
            target, {None: 0.0, **{choice: weights[target.spec.name] * error for choice, error in errors.items()}}
        )
        for target in targets
    ]


def harm_weights(specs: Iterable[TensorSpec]) -> dict[str, float]:
    """What an error of each matrix counts, by name. An embedding that is the head too counts as both."""
    specs = list(specs)
    layers = 1 + max((layer for spec in specs if (layer := decoder_layer(spec.name)) is not None), default=0)
    embedding, head = layers * KIND_WEIGHTS[Kind.EMBEDDING], layers * KIND_WEIGHTS[Kind.HEAD]
    tied = not any(spec.role is Role.HEAD for spec in specs)
    ends = {Kind.EMBEDDING: embedding + (head if tied else 0), Kind.HEAD: head}
    return {spec.name: {**KIND_WEIGHTS, **ends}[kind_of(spec)] for spec in specs}


def sampled_rows(target: Target) -> mx.array:
    """Up to 256 rows of a matrix, of all its experts together, as fp32 [R, K].

    Raises DamagedPieceError for values that are NaN or infinite.
    """
    blocks = list(_blocks(target))
    rows = mx.concatenate([dense_values(piece).astype(mx.float32) for piece in blocks])
    if not is_finite(rows):  # which one it is matters only now
        for piece in blocks:
            sound_values(piece)
    return rows


def _errors(rows: mx.array, choices: Iterable[Quantization], importance: mx.array | None) -> dict[Quantization, float]:
    """Σ h (w − packed w)² / Σ h w² for each choice, packed as MLX rounds.

    Affine codes are rounded here and never packed: MLX's packing and unpacking take ten times as long on a CPU.
    """
    values = as_float32(rows)
    h = np.ones(values.shape[1], np.float32) if importance is None else as_float32(importance.astype(mx.float32))
    held = max(float(np.sum((values * values) @ h)), _TINY)
    errors, grouped = {}, {}
    for choice in choices:
        if choice.mode == "affine":
            if choice.group_size not in grouped:
                grouped[choice.group_size] = _Grouped.of(values, choice.group_size, None if importance is None else h)
            lost = grouped[choice.group_size].lost(choice.bits)
        else:
            codes, scales, *_ = mx.quantize(rows, choice.group_size, choice.bits, choice.mode)
            restored = mx.dequantize(codes, scales, None, choice.group_size, choice.bits, choice.mode)
            lost = float(np.sum((values - as_float32(restored)) ** 2 @ h))
        errors[choice] = lost / held
    return errors


@dataclass(frozen=True, slots=True)
class _Grouped:
    """Rows in groups [G, g], the least and greatest of each, and how much each weight counts."""

    groups: Floats
    range: tuple[Floats, Floats]
    importance: Floats | None

    @classmethod
    def of(cls, values: Floats, group_size: int, importance: Floats | None) -> "_Grouped":
        groups = values.reshape(-1, group_size)
        h = None if importance is None else np.broadcast_to(importance, values.shape).reshape(groups.shape)
        return cls(groups, extremes(groups), h)

    def lost(self, bits: int) -> float:
        """Σ h (w − packed w)² of affine codes."""
        grids = mlx_grids(*self.range, bits, "float32")
        return float(rounding_errors(self.groups, grids, bits, self.importance).sum(dtype=np.float64))


def _blocks(target: Target) -> Iterator[Piece]:
    """Blocks of eight rows, spread evenly over the rows of all sources."""
    output = Output(target, None, "float32")
    ranges = [source.rows or (0, source.matrix.shape[0]) for source in target.sources]
    starts = list(accumulate((last - first for first, last in ranges), initial=0))
    total = starts[-1]
    count = max(1, min(SAMPLED_ROWS, total) // _BLOCK_ROWS)
    for row in (i * total // count for i in range(count)):
        at = bisect_right(starts, row) - 1
        first, last = ranges[at]
        begin = first + row - starts[at]
        yield Piece(output, target.sources[at], (begin, min(begin + _BLOCK_ROWS, last)))
