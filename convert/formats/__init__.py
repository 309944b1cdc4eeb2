"""Formats of other runtimes, decoded while they are read: `decodable` makes a plain checkpoint of one."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain

from mlx_qwen.checkpoint.foreign import foreign_quantization, unreadable
from mlx_qwen.checkpoint.layout import Quantization, Target
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError

from . import auto_round, awq, compressed_tensors, floats, fp8, gptq, mlx_experts
from .encoded import Encoded, Format, Matrix, RowReader, Stack, encoded
from .integers import IntegerMatrix
from .stated import check_stated

_FORMATS: dict[str, Format] = {
    "fp8": fp8.matrices,
    "gptq": gptq.matrices,
    "awq": awq.matrices,
    "auto-round": auto_round.matrices,
    "compressed-tensors": compressed_tensors.matrices,
    "modelopt": floats.matrices,
    "modelopt_fp4": floats.matrices,
    "quark": floats.matrices,
}
_EXPERT = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(\w+_proj)")
# Readers join gate and up of the experts, which therefore have one precision.
_JOINED_PROJECTIONS = (("gate_proj", "up_proj"), ("down_proj",))


def decodable(
    config: ModelConfig, tensors: dict[str, TensorInfo], keeps: Callable[[Quantization], bool]
) -> dict[str, TensorInfo]:
    """`tensors` with the encoded ones replaced by arrays that decode themselves, under names that a plan knows.

    A matrix whose integer codes MLX can hold, in a precision that `keeps` accepts, becomes MLX-quantized `weight`,
    `scales` and `biases`; any other a dense `weight`. Experts that are packed for MLX one by one are stacked. Raises
    CheckpointError for an unknown format, settings of another type, and tensors that are missing or misshapen.
    """
    settings = foreign_quantization(config)
    if settings is None or auto_round.is_for_mlx(settings):
        return mlx_experts.stacked(tensors)
    method = settings["quant_method"]
    if method not in _FORMATS:
        raise CheckpointError(f"config.json says that the weights are {unreadable(method)}")
    check_stated(method, settings)
    matrices = _FORMATS[method](settings, tensors)
    if not matrices:
        raise CheckpointError(
            f"config.json says that the weights are quantized with {method!r}, but no tensor is. The config belongs to "
            "other weights: download the folder again."
        )
    used = {part.name for matrix in matrices.values() for part in matrix.parts}
    plain = {name: info for name, info in tensors.items() if name not in used}
    return plain | _arranged(matrices, keeps)


def is_encoded(target: Target) -> bool:
    """Whether the matrix is stored in a format of another runtime."""
    return any(isinstance(source.tensor, Encoded) for source in target.sources)


def keeps_codes(target: Target) -> bool:
    """Whether it is, and its codes are written as they are."""
    return is_encoded(target) and target.quantization is not None


def _arranged(matrices: Mapping[str, Matrix | Stack], keeps: Callable[[Quantization], bool]) -> dict[str, TensorInfo]:
    arranged: dict[str, TensorInfo] = {}
    experts: dict[str, dict[str, dict[int, Matrix]]] = {}
    for base, matrix in matrices.items():
        match = _EXPERT.fullmatch(base)
        if isinstance(matrix, Stack):
            arranged[base] = _stacked(base, matrix)
        elif match is not None:
            experts.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = matrix
        elif _kept([matrix], keeps):
            arranged |= _packed(base, [matrix], stacked=False)
        else:
            arranged[f"{base}.weight"] = _dense(base, matrix)
    for mlp, projections in experts.items():
        for names in _JOINED_PROJECTIONS:
            arranged |= _arranged_experts(mlp, {name: projections.get(name, {}) for name in names}, keeps)
    return arranged


def _arranged_experts(
    mlp: str, projections: dict[str, dict[int, Matrix]], keeps: Callable[[Quantization], bool]
) -> dict[str, TensorInfo]:
    """Packed and stacked if all of them can be, else one dense matrix an expert."""
    members = list(chain.from_iterable(projection.values() for projection in projections.values()))
    complete = all(sorted(found) == list(range(len(found))) for found in projections.values())
    arranged: dict[str, TensorInfo] = {}
    for name, found in projections.items():
        if complete and _kept(members, keeps):
            ordered = [found[i] for i in sorted(found)]
            arranged |= _packed(f"{mlp}switch_mlp.{name}", ordered, stacked=True)
        else:
            bases = {f"{mlp}experts.{i}.{name}": matrix for i, matrix in found.items()}
            arranged |= {f"{base}.weight": _dense(base, matrix) for base, matrix in bases.items()}
    return arranged


def _kept(matrices: Iterable[Matrix], keeps: Callable[[Quantization], bool]) -> bool:
    """Whether all of them, of one shape and precision, have codes that MLX can hold and that are wanted."""
    kinds = {(matrix.shape, matrix.affine if isinstance(matrix, IntegerMatrix) else None) for matrix in matrices}
    _, grid = kinds.pop() if len(kinds) == 1 else (None, None)
    return grid is not None and keeps(grid)


def _dense(base: str, matrix: Matrix) -> Encoded:
    return encoded(f"{base}.weight", matrix.parts, matrix.shape, (matrix.values,))


def _stacked(base: str, stack: Stack) -> Encoded:
    shape = (len(stack.members), *stack.members[0].shape)
    return encoded(base, stack.parts, shape, tuple(member.values for member in stack.members))


def _packed(base: str, matrices: list[Matrix], *, stacked: bool) -> dict[str, TensorInfo]:
    """`weight`, `scales` and `biases` as MLX quantizes; what is stored counts once, as part of `weight`."""
    members = [matrix for matrix in matrices if isinstance(matrix, IntegerMatrix)]
    grid = members[0].affine
    assert grid is not None, "only matrices that MLX can hold are packed"
    rows, columns = members[0].shape
    leading = (len(members), rows) if stacked else (rows,)
    every_part = tuple(chain.from_iterable(member.parts for member in members))
    words, groups = columns * grid.bits // 32, columns // grid.group_size

    def array(name: str, width: int, readers: Iterable[RowReader], dtype: str = "F32") -> Encoded:
        return encoded(f"{base}.{name}", every_part, (*leading, width), tuple(readers), dtype)

    arrays = (
        array("weight", words, (member.words for member in members), "U32"),
        replace(array("scales", groups, (member.affine_scales for member in members)), nbytes=0),
        replace(array("biases", groups, (member.affine_biases for member in members)), nbytes=0),
    )
    return {info.name: info for info in arrays}
