"""What is left to the converter: a dtype for a chip, bits that meet a size."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.layout import Plan
from mlx_qwen.config import ModelConfig

from ..settings import AUTO, Settings
from .dtypes import dtype_for_chip
from .fitting import fitted_recipe
from .importance import input_squares


@dataclass(frozen=True, slots=True)
class Choices:
    """Settings that leave nothing open, and sentences about what was chosen."""

    settings: Settings
    remarks: tuple[str, ...] = ()


def choose(
    settings: Settings,
    config: ModelConfig,
    plan: Plan,
    windows: npt.NDArray[np.int64] | None = None,
    progress: bool | None = None,
    *,
    headers_only: bool = False,
) -> Choices:
    """Read of the source's weights what `settings` leave to them, and decide; nothing is read otherwise.

    With the token ids `windows` [n, T] of a calibration text, bits that meet a size are chosen by errors of what enters
    the matrices on it. `headers_only` says that the weights are not there to be read.

    Raises ConversionError when the size asked for cannot be met, or the chip is unknown.
    """
    remarks: tuple[str, ...] = ()
    if settings.dtype == AUTO:
        dtype, reason = dtype_for_chip(settings.chip, plan.targets, progress)
        settings, remarks = replace(settings, dtype=dtype), (f"Unpacked weights are {reason}.",)
    if settings.is_open and headers_only:
        settings = replace(settings, recipe=fitted_recipe(plan, settings, expected=True))
        remarks += ("Bits go by the errors to be expected of each kind of matrix, as no weights are here to measure.",)
    elif settings.is_open:
        importance = None if windows is None else input_squares(config, plan, windows)
        recipe = fitted_recipe(plan, settings, importance=importance, progress=progress)
        settings = replace(settings, recipe=recipe)
    return Choices(settings, remarks)
