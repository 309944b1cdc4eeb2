"""The dtype of what is not packed, chosen for a chip, and whether the weights fit into it."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from math import inf, prod

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Target
from mlx_qwen.errors import ConversionError

from ..outputs import Output
from ..planning.chips import CHIP_NAMES, chip_named, this_chip
from ..progress import Progress
from ..settings import DType
from ..work.pieces import cut, dense_values
from ..workers import piece_count

FLOAT16_LIMIT = 65504.0


def dtype_for_chip(chip: str | None, targets: Iterable[Target], progress: bool | None = None) -> tuple[DType, str]:
    """float16 for M1 and M2, whose GPUs have no bf16 of their own, if every weight fits into it; bfloat16 otherwise.

    Returns the dtype and a sentence that says why. `chip` None is that of this machine. Only for float16 are the
    weights read, all of them; whether activations stay in its range shows only when the model runs.

    Raises ConversionError for an unknown chip.
    """
    found = this_chip() if chip is None else chip_named(chip)
    if chip is not None and found is None:
        raise ConversionError(f"chip is {chip!r}, expected one of {', '.join(CHIP_NAMES)}.")
    if found is None:
        return "bfloat16", "bfloat16, as this machine has no Apple chip that is known to be faster in float16"
    if found.has_bf16:
        return "bfloat16", f"bfloat16, which {found.name} computes with itself"
    name, value = largest_weight(targets, progress)
    if value > FLOAT16_LIMIT:
        return "bfloat16", (
            f"bfloat16, although {found.name} is faster in float16: {name} holds {value:,.0f}, and float16 ends at "
            f"{FLOAT16_LIMIT:,.0f}"
        )
    return "float16", (
        f"float16, which {found.name} is faster in: the largest weight, {value:,.4g} in {name}, is below its limit of "
        f"{FLOAT16_LIMIT:,.0f}; activations were not checked"
    )


def largest_weight(targets: Iterable[Target], progress: bool | None = None) -> tuple[str, float]:
    """The tensor with the weight of largest magnitude, and that magnitude, which is infinite for NaN.

    A_log is left out, as it stays in fp32.
    """
    checked = [target for target in targets if not target.spec.name.endswith(".A_log")]
    total = sum(4 * prod(target.spec.shape) for target in checked)
    name, value = "", 0.0
    with Progress(total, progress, verb="Checking") as line, ThreadPoolExecutor(piece_count()) as pool:
        for target, found in zip(checked, pool.map(_largest, checked), strict=True):
            if found > value:
                name, value = target.spec.name, found
            line.advance(4 * prod(target.spec.shape))
    return name, value


def _largest(target: Target) -> float:
    found = 0.0
    for piece in cut(Output(target, None, "float32")):
        values = dense_values(piece)
        largest = mx.where(mx.isnan(values), inf, mx.abs(values)).max()
        found = max(found, float(largest))
    return found
