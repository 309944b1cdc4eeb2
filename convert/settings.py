"""What the user asks of a conversion, checked before anything is read."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mlx_qwen.checkpoint.layout import Mode, Quantization
from mlx_qwen.errors import ConversionError

from .recipes.precisions import precision
from .recipes.recipe import DEFAULT_RECIPE, Recipe, named, uniform
from .recipes.rules import written_rules

DType = Literal["bfloat16", "float16", "float32"]
AskedDType = DType | Literal["auto"]
Quantizer = Literal["rtn", "search", "gptq"]
AUTO: Literal["auto"] = "auto"
DEFAULT_TEXT = "default"
_DTYPES: tuple[AskedDType, ...] = (*get_args(DType), AUTO)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class Settings:
    """The `recipe` of all matrices (None: none is packed), and the `dtype` of the rest (None: the source's).

    `asked` says that the user chose the recipe, and `exact` that bits, group size and mode were named. With a
    `target_size` in bytes, the recipe's `default` only says what group size is meant until bits are chosen to fit.
    `chip` is the one that "auto" chooses a dtype for, None for this machine's. `calibration` is set for the
    `quantizer` "gptq" alone.
    """

    recipe: Recipe | None
    dtype: AskedDType | None
    dequantize: bool
    asked: bool = False
    exact: bool = False
    target_size: int | None = None
    chip: str | None = None
    quantizer: Quantizer = "search"
    calibration: str | Path | None = None

    @property
    def quantization(self) -> Quantization | None:
        """The precision of whatever the recipe does not name."""
        return None if self.recipe is None else self.recipe.default

    @property
    def reads_values(self) -> bool:
        """Whether what is chosen depends on the weights themselves, beyond their headers."""
        return self.target_size is not None or self.dtype == AUTO

    def keeps(self, quantization: Quantization) -> bool:
        """Whether codes that a source of another runtime has in this precision are better kept than packed again."""
        if self.recipe is None:
            return False
        if self.exact:
            return quantization == self.recipe.default
        # With a size to meet, all is open; a recipe by name says bits, and the source's own groups lose nothing.
        same = (quantization.bits, quantization.mode) == (self.recipe.default.bits, self.recipe.default.mode)
        return not self.asked or (same and self.target_size is None)


def check_settings(
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: Mode | None = None,
    recipe: str | None = None,
    bits_for: Mapping[str, int | str] | None = None,
    target_size: int | str | None = None,
    dtype: AskedDType | None = None,
    chip: str | None = None,
    quantizer: Quantizer | None = None,
    calibration: str | Path | None = None,
    quantize: bool = True,
    dequantize: bool = False,
) -> Settings:
    """Make one recipe of what is asked; raises ConversionError for contradictions and for what MLX cannot store."""
    if dtype is not None and dtype not in _DTYPES:
        raise ConversionError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}.")
    if chip is not None and dtype != AUTO:
        raise ConversionError('chip only matters for the dtype "auto". Leave it out, or ask for that dtype.')
    asked = {
        "bits": bits,
        "group_size": group_size,
        "mode": mode,
        "recipe": recipe,
        "bits_for": bits_for or None,
        "target_size": target_size,
        "quantizer": quantizer,
        "calibration": calibration,
    }
    given = [name for name, value in asked.items() if value is not None]
    if dequantize or not quantize:
        if given:
            matter, them = ("matters", "it") if len(given) == 1 else ("matter", "them")
            raise ConversionError(
                f"{' and '.join(given)} only {matter} when quantizing, which is turned off. Leave {them} out, or "
                "quantize."
            )
        return Settings(None, dtype, dequantize, chip=chip)
    _check_apart(given)
    rules = written_rules(bits_for or {}, group_size)
    exact = bits is not None or mode is not None or (group_size is not None and recipe is None and target_size is None)
    return Settings(
        recipe=_recipe(bits, group_size, mode, recipe, exact, target_size is not None).with_rules(rules),
        dtype=dtype,
        dequantize=False,
        asked=exact or recipe is not None or target_size is not None,
        exact=exact,
        target_size=None if target_size is None else size_in_bytes(target_size),
        chip=chip,
        quantizer=_quantizer(quantizer, calibration),
        calibration=_calibration(quantizer, calibration),
    )


def _quantizer(asked: Quantizer | None, calibration: str | Path | None) -> Quantizer:
    """The quantizer asked for, else the one that `calibration` calls for."""
    if asked is not None and asked not in get_args(Quantizer):
        raise ConversionError(f"quantizer is {asked!r}, expected one of {', '.join(get_args(Quantizer))}.")
    calibrated = calibration is not None and calibration != "none"
    if asked == "gptq" and calibration == "none":
        raise ConversionError(
            f'The quantizer "gptq" needs a calibration text. Give one, or "{DEFAULT_TEXT}", or choose "search".'
        )
    if asked in ("rtn", "search") and calibrated:
        raise ConversionError(f'The quantizer "{asked}" reads no calibration text. Leave it out, or choose "gptq".')
    return asked or ("gptq" if calibrated else "search")


def _calibration(quantizer: Quantizer | None, asked: str | Path | None) -> str | Path | None:
    """The calibration text, where one is asked for or implied."""
    if asked is None:
        return DEFAULT_TEXT if quantizer == "gptq" else None
    return None if asked == "none" else asked


def _check_apart(given: list[str]) -> None:
    """Bits and mode, a recipe and a size each say which matrix gets how many bits; only one of them can."""
    ways = [name for name in given if name in ("bits", "mode", "recipe", "target_size")]
    if len(ways) > 1 and ways != ["bits", "mode"]:
        raise ConversionError(
            f"{' and '.join(ways)} contradict each other: each decides about every matrix. Choose one of them, and say "
            "with bits_for which matrices differ."
        )


def _recipe(
    bits: int | None, group_size: int | None, mode: Mode | None, name: str | None, exact: bool, fitted: bool
) -> Recipe:
    if exact:
        return uniform(precision(bits, group_size, mode))
    if fitted:
        return uniform(precision(None, group_size), "fitted")
    return named(name or DEFAULT_RECIPE, group_size)


def size_in_bytes(size: int | str) -> int:
    """Bytes of a size on a disk: a number, or text such as "16GB" (10^9 bytes each), "800MB" or "16GiB" (2^30)."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size), re.IGNORECASE)
    unit = None if found is None else _UNITS.get(found[2].lower())
    if found is None or unit is None or (nbytes := int(float(found[1]) * unit)) <= 0:
        raise ConversionError(
            f"target_size is {size!r}, expected a positive number of bytes, or of kB, MB or GB (10^3, 10^6 or 10^9 "
            "bytes) or KiB, MiB or GiB (2^10, 2^20 or 2^30), such as 16GB."
        )
    return nbytes
