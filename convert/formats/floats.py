"""Floats with scales, known by what modules hold: ModelOpt's NVFP4 and FP8, Quark's MXFP4 and FP8.

By what a module with N outputs and K inputs holds:
- `weight` uint8 [N, K / 2] of e2m1 numbers, the first in the lower half, e4m3 `weight_scale` [N, K / 16] and fp32
  `weight_scale_2`: the product of all three;
- such a `weight`, and e8m0 `weight_scale` uint8 [N, K / 32], the exponent of 2 plus 127;
- `weight` e4m3 [N, K] and a `weight_scale` for each row, for each block of 128 × 128, or one for all, which multiplies.

Layers of one checkpoint may differ (MIXED_PRECISION). Source: the exports of https://github.com/NVIDIA/Model-Optimizer
and https://github.com/amd/Quark.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Stack, Tensors, expect_shape, matrix_shape, powers_of_two, required
from .fp8 import E4M3, row_or_block_scaled

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
FP4_GROUP, MX_GROUP = 16, 32
EXPONENTS = ("U8", "F8_E8M0")
_BLOCK = (128, 128)
_UNUSED = ("input_scale", "input_scale_2", "output_scale")


@dataclass(frozen=True, slots=True)
class FloatMatrix:
    """One module of e2m1 or e4m3 numbers, with an e4m3 or e8m0 scale a group and perhaps one for all.

    The latter divides, or multiplies where `multiplies` says so.
    """

    codes: TensorInfo
    scale: TensorInfo
    global_scale: TensorInfo | None
    group_size: int
    unused: tuple[TensorInfo, ...]
    multiplies: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.scale.shape[1] * self.group_size

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        used = (self.codes, self.scale, *([] if self.global_scale is None else [self.global_scale]))
        return (*used, *self.unused)

    def values(self, start: int, stop: int) -> mx.array:
        """Rows start:stop in fp32, in which the products are exact but for that with the scale of all."""
        codes = self.codes.read(start, stop)
        if self.codes.dtype == E4M3:
            numbers = mx.from_fp8(codes, mx.float32)
        else:
            numbers = mx.take(mx.array(_E2M1), mx.stack([codes & 15, codes >> 4], axis=-1).flatten(-2))
        return numbers * mx.repeat(self._scales(start, stop), self.group_size, axis=1)

    def _scales(self, start: int, stop: int) -> mx.array:
        stored = self.scale.read(start, stop)
        scales = mx.from_fp8(stored, mx.float32) if self.scale.dtype == E4M3 else powers_of_two(stored)
        if self.global_scale is None:
            return scales
        whole = self.global_scale.read().astype(mx.float32).reshape(())
        return scales * whole if self.multiplies else scales / whole


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix | Stack]:
    """Every module with a `weight_scale`; raises CheckpointError for misshapen or missing tensors.

    Also for modules whose inputs are scaled first (`pre_quant_scale`), which no MLX model does.
    """
    found: dict[str, Matrix | Stack] = {}
    for name, info in tensors.items():
        base, _, part = name.rpartition(".")
        if part != "weight" or f"{base}.weight_scale" not in tensors:
            continue
        if f"{base}.pre_quant_scale" in tensors:
            raise CheckpointError(
                f"{base} scales its inputs (pre_quant_scale, as AWQ in ModelOpt does), which MLX checkpoints do not "
                "hold. Use NVFP4 or FP8 without AWQ, or the unquantized checkpoint."
            )
        unused = tuple(tensors[f"{base}.{key}"] for key in _UNUSED if f"{base}.{key}" in tensors)
        if info.dtype == "U8":
            found[base] = _fp4(base, info, tensors, unused)
        elif info.dtype == E4M3:
            found[base] = row_or_block_scaled(info, tensors[f"{base}.weight_scale"], _BLOCK, unused)
    return found


def _fp4(base: str, weight: TensorInfo, tensors: Tensors, unused: tuple[TensorInfo, ...]) -> FloatMatrix:
    (rows, columns), scale = matrix_shape(weight), tensors[f"{base}.weight_scale"]
    if scale.dtype in EXPONENTS:
        expect_shape(scale, (rows, 2 * columns // MX_GROUP), base)
        return FloatMatrix(weight, scale, None, MX_GROUP, unused)
    if scale.dtype != E4M3:
        raise CheckpointError(
            f"{scale.name} has dtype {scale.dtype}, expected {E4M3} as NVFP4 has or U8 as MXFP4 has. Use another "
            "checkpoint of the model."
        )
    expect_shape(scale, (rows, 2 * columns // FP4_GROUP), base)
    whole = required(tensors, f"{base}.weight_scale_2", base)
    if whole.shape not in ((), (1,)):
        expect_shape(whole, (1,), base)
    return FloatMatrix(weight, scale, whole, FP4_GROUP, unused, multiplies=True)
