"""FP8 as Qwen publishes it (`quant_method` fp8): e4m3 weights, and a scale for every block of 128 × 128 of them.

Others write `weight_scale` for each row, for each block, or one for all; it is multiplied by as well.

Experts come one by one, as Qwen stores them, or as `gate_up_proj` and `down_proj` of all, as transformers holds them.

Source: the `weight_block_size` and `weight_scale_inv` of transformers' fine-grained FP8, documented at
https://huggingface.co/docs/transformers/quantization/finegrained_fp8. Despite its name the scale is multiplied by.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Stack, Tensors, expect_shape, matrix_shape, powers_of_two, required

E4M3, E8M0 = "F8_E4M3", "F8_E8M0"
_SCALES = ("_scale_inv", "_scale")
_ACTIVATION_SCALES = ("activation_scale", "input_scale")


@dataclass(frozen=True, slots=True)
class Float8Matrix:
    """value = e4m3 weight [N, K] × the scale of its block; `scale` is [ceil(N / block[0]), ceil(K / block[1])]."""

    weight: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    unused: tuple[TensorInfo, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.weight.shape
        return rows, columns

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.weight, self.scale, *self.unused)

    def values(self, start: int, stop: int) -> mx.array:
        """Rows start:stop in fp32, in which the product of a weight and a bf16 scale is exact."""
        rows, columns = self.block
        first = start // rows
        stored = self.scale.read(first, -(-stop // rows))
        scales = powers_of_two(stored) if self.scale.dtype == E8M0 else stored.astype(mx.float32)
        scales = mx.repeat(scales, rows, axis=0)[start - first * rows : stop - first * rows]
        scales = mx.repeat(scales, columns, axis=1)[:, : self.shape[1]]
        return mx.from_fp8(self.weight.read(start, stop), mx.float32) * scales


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix | Stack]:
    """Every e4m3 weight by module name; raises CheckpointError for one without its scales, or with misshapen ones."""
    block = _block_size(settings)
    found: dict[str, Matrix | Stack] = {}
    for name, info in tensors.items():
        if info.dtype == E4M3:
            base = name.removesuffix(".weight")
            stated = next((key for key in _SCALES if f"{name}{key}" in tensors), _SCALES[0])
            scale = required(tensors, f"{name}{stated}", name)
            unused = tuple(tensors[f"{base}.{key}"] for key in _ACTIVATION_SCALES if f"{base}.{key}" in tensors)
            found[base] = (_stacked if len(info.shape) == 3 else row_or_block_scaled)(info, scale, block, unused)
    return found


def _stacked(
    weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, unused: tuple[TensorInfo, ...]
) -> Stack:
    experts = weight.shape[0]
    if not experts or scale.shape[:1] != (experts,):
        raise CheckpointError(
            f"{scale.name} in {scale.file.name} has shape {list(scale.shape)}, expected scales of {experts} experts "
            f"for {weight.name}. The file is damaged: download the folder again."
        )
    members = tuple(block_scaled(weight.entry(i), scale.entry(i), block) for i in range(experts))
    return Stack(members, (weight, scale, *unused))


def block_scaled(
    weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, unused: tuple[TensorInfo, ...] = ()
) -> Float8Matrix:
    """The matrix of `weight` and `scale`; `block` None, or a single scale, means one for the whole matrix."""
    rows, columns = matrix_shape(weight)
    if scale.shape in ((), (1,)):
        scale = replace(scale, shape=(1, 1))
    if block is None or scale.shape == (1, 1):
        block = (rows, columns)
    expect_shape(scale, (-(-rows // block[0]), -(-columns // block[1])), weight.name)
    return Float8Matrix(weight, scale, block, unused)


def row_or_block_scaled(
    weight: TensorInfo, scale: TensorInfo, block: tuple[int, int] | None, unused: tuple[TensorInfo, ...] = ()
) -> Float8Matrix:
    """As `block_scaled`, where scales [N] or [N, 1] are one for each row."""
    rows, columns = matrix_shape(weight)
    if rows > 1 and scale.shape in ((rows,), (rows, 1)):
        return block_scaled(weight, replace(scale, shape=(rows, 1)), (1, columns), unused)
    return block_scaled(weight, scale, block, unused)


def _block_size(settings: Json) -> tuple[int, int] | None:
    """Rows and columns of a block; None where there is one scale for all."""
    size = settings.get("weight_block_size", (128, 128))
    return None if size is None else (size[0], size[1])
