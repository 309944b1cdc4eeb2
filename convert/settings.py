"""What the user asks of a conversion, checked before anything is read."""

from dataclasses import dataclass
from typing import Literal, get_args

from mlx_qwen.checkpoint import Mode, Quantization
from mlx_qwen.errors import ConversionError

DType = Literal["bfloat16", "float16", "float32"]

_MODES: dict[Mode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """`quantization` of most matrices (None: none is packed), and the `dtype` of the rest (None: the source's).

    `asked` says that the user chose the quantization.
    """

    quantization: Quantization | None
    dtype: DType | None
    dequantize: bool
    asked: bool = False

    def keeps(self, quantization: Quantization) -> bool:
        """Whether codes that a source of another runtime has in this precision are better kept than packed again."""
        return self.quantization is not None and (not self.asked or quantization == self.quantization)


def check_settings(
    *,
    bits: int | None,
    group_size: int | None,
    mode: Mode,
    dtype: DType | None,
    quantize: bool,
    dequantize: bool,
) -> Settings:
    """Fill in the mode's own bits and group size; raises ConversionError for what MLX cannot store."""
    if dtype is not None and dtype not in get_args(DType):
        raise ConversionError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(DType))}.")
    if dequantize or not quantize:
        asked = [name for name, value in (("bits", bits), ("group_size", group_size)) if value is not None]
        if mode != "affine":
            asked.append("mode")
        if asked:
            raise ConversionError(
                f"{' and '.join(asked)} only matter when quantizing, which is turned off. Leave them out, or quantize."
            )
        return Settings(None, dtype, dequantize)
    chosen = bits is not None or group_size is not None or mode != "affine"
    return Settings(_quantization(bits, group_size, mode), dtype, dequantize=False, asked=chosen)


def _quantization(bits: int | None, group_size: int | None, mode: Mode) -> Quantization:
    if mode not in _MODES:
        raise ConversionError(f"mode is {mode!r}, expected one of {', '.join(_MODES)}.")
    all_bits, all_groups = _MODES[mode]
    chosen = Quantization(
        bits=all_bits[0] if bits is None else bits,
        group_size=all_groups[0] if group_size is None else group_size,
        mode=mode,
    )
    for name, value, allowed in (("bits", chosen.bits, all_bits), ("group_size", chosen.group_size, all_groups)):
        if value not in allowed:
            choices = ", ".join(str(choice) for choice in sorted(allowed))
            raise ConversionError(f"{name} is {value}, but {mode} has only {choices}.")
    return chosen
