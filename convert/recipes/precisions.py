"""How a matrix may be packed: bits, group sizes and modes that MLX has, and how people write them."""

import re

from mlx_qwen.checkpoint.layout import Mode, Quantization
from mlx_qwen.errors import ConversionError

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
DEFAULT_GROUP = 64
_DEFAULT_BITS = 4
_MODES: dict[Mode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": (AFFINE_BITS, (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
_UNPACKED = ("none", "bf16")
_WRITTEN = re.compile(r"(\d+)(?:,(\d+))?")


def precision(bits: int | None = None, group_size: int | None = None, mode: Mode | None = None) -> Quantization:
    """The quantization asked for, filled up with the mode's own; raises ConversionError for what MLX cannot store."""
    mode = "affine" if mode is None else mode
    if mode not in _MODES:
        raise ConversionError(f"mode is {mode!r}, expected one of {', '.join(_MODES)}.")
    all_bits, all_groups = _MODES[mode]
    usual_bits, usual_group = (_DEFAULT_BITS, DEFAULT_GROUP) if mode == "affine" else (all_bits[0], all_groups[0])
    chosen = Quantization(
        bits=usual_bits if bits is None else bits,
        group_size=usual_group if group_size is None else group_size,
        mode=mode,
    )
    for name, value, allowed in (("bits", chosen.bits, all_bits), ("group_size", chosen.group_size, all_groups)):
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in allowed)
            raise ConversionError(f"{name} is {value}, but {mode} has only {choices}.")
    return chosen


def written_precision(text: str, group_size: int | None = None) -> Quantization | None:
    """What "8", "8,32", "mxfp4" or "none" (left unpacked) mean; `group_size` is that of bits without one.

    Raises ConversionError for other texts.
    """
    if text in _UNPACKED:
        return None
    for mode in _MODES:
        if text == mode != "affine":
            return precision(mode=mode)
    found = _WRITTEN.fullmatch(text)
    if found is None:
        modes = ", ".join(mode for mode in _MODES if mode != "affine")
        raise ConversionError(
            f"{text!r} is no precision, expected bits as 8, bits and group size as 8,32, {modes} or none."
        )
    return precision(int(found[1]), int(found[2]) if found[2] else group_size)


def shown_precision(quantization: Quantization | None, dtype: str) -> str:
    """A precision in a few words, such as "4 bits, groups of 64"; `dtype` for a tensor that is not packed."""
    if quantization is None:
        return dtype
    name = f"{quantization.bits} bits" if quantization.mode == "affine" else quantization.mode
    return f"{name}, groups of {quantization.group_size}"
