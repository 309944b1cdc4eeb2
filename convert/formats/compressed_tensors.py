"""compressed-tensors (`quant_method` compressed-tensors): packed and plain integers, FP8, NVFP4, MXFP4 and MXFP8.

By what a module with N outputs and K inputs holds, every value being (code − zero) · `weight_scale`:
- `weight_packed` int32 [N, ⌈K · bits / 32⌉], codes of 2 to 8 bits with half their range added, one behind the other
  from the lowest bits on; `weight_shape` [2]; `weight_scale` [N, groups]; where asymmetric `weight_zero_point` int32
  [⌈N · bits / 32⌉, groups], packed along the outputs; where act-ordered `weight_g_idx` [K], the group of each input;
- `weight` int8 [N, K], `weight_scale` and where asymmetric `weight_zero_point` int8 [N, 1] (or one for all);
- `weight` e4m3 [N, K] and `weight_scale` for each row, for each block, or one for all;
- `weight_packed` uint8 [N, K / 2] of e2m1 numbers, the first in the lower half, e4m3 `weight_scale` [N, K / 16] and
  `weight_global_scale` [1], which divides;
- without a global scale, the same numbers and e8m0 `weight_scale` uint8 [N, K / 32], the exponent of 2 plus 127;
- `weight` e4m3 [N, K] and such a `weight_scale` [N, K / 32].

Source: https://github.com/vllm-project/compressed-tensors, whose compressors define these formats.
"""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Tensors, expect_shape, is_elsewhere, matrix_shape, required
from .floats import EXPONENTS, FP4_GROUP, MX_GROUP, FloatMatrix
from .fp8 import E4M3, block_scaled
from .integers import IntegerMatrix, act_order, block, stated_group_size, unpack

_BITS = range(2, 9)
_FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)
_STORED_ROTATIONS = ("weight_input", "weight_output")
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "weight_shape")


@dataclass(frozen=True, slots=True)
class PackedMatrix(IntegerMatrix):
    """One module of packed integers, whose words are those of MLX."""

    stored_words: TensorInfo
    stored_scales: TensorInfo
    zero_points: TensorInfo | None

    def words(self, start: int, stop: int) -> mx.array:
        return _whole_blocks(self.stored_words.read(start, stop).view(mx.uint32), self.bits)

    def scales(self, start: int, stop: int) -> mx.array:
        return self.stored_scales.read(start, stop).astype(mx.float32)

    def zeros(self, start: int, stop: int) -> mx.array:
        if self.zero_points is None:
            return mx.full((stop - start, self.stored_scales.shape[1]), float(1 << (self.bits - 1)))
        count, width = block(self.bits)
        first = start // count
        last = min(-(-stop // count) * width, self.zero_points.shape[0])
        words = self.zero_points.read(first * width, last).view(mx.uint32)
        codes = unpack(_whole_blocks(words.T, self.bits), self.bits).T
        return codes[start - first * count : stop - first * count].astype(mx.float32)


@dataclass(frozen=True, slots=True)
class Int8Matrix(IntegerMatrix):
    """One module of signed bytes, which become codes by adding 128."""

    weight: TensorInfo
    stored_scales: TensorInfo
    zero_points: TensorInfo | None

    def words(self, start: int, stop: int) -> mx.array:
        return (self.weight.read(start, stop).view(mx.uint8) ^ 128).view(mx.uint32)

    def scales(self, start: int, stop: int) -> mx.array:
        return _rows(self.stored_scales, start, stop)

    def zeros(self, start: int, stop: int) -> mx.array:
        if self.zero_points is None:
            return mx.full((stop - start, 1), 128.0)
        return _rows(self.zero_points, start, stop) + 128


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module that is packed or has a `weight_scale`; raises CheckpointError for misshapen or missing tensors."""
    _check_formats(settings)
    _check_transforms(settings)
    found: dict[str, Matrix] = {}
    for name, info in tensors.items():
        base, _, part = name.rpartition(".")
        if part == "weight_packed":
            found[base] = _fp4(base, info, tensors) if info.dtype == "U8" else _packed(base, info, settings, tensors)
        elif part == "weight" and info.dtype == E4M3:
            found[base] = (_mxfp8 if _has_exponents(base, tensors) else _fp8)(base, info, settings, tensors)
        elif part == "weight" and info.dtype == "I8":
            found[base] = _int8(base, info, tensors)
    return found


def _check_formats(settings: Json) -> None:
    named = [settings.get("format"), *(group.get("format") for group in _groups(settings))]
    unknown = [name for name in named if name is not None and name not in _FORMATS]
    if unknown:
        raise CheckpointError(
            f"quantization_config names the compressed-tensors format {unknown[0]!r}, expected one of "
            f"{', '.join(_FORMATS)}. Use another checkpoint of the same model."
        )


def _check_transforms(settings: Json) -> None:
    """Raise CheckpointError for rotations that have to be applied while the model runs.

    Those of weights alone are part of what is stored, and cancel each other.
    """
    transforms = settings.get("transform_config") or {}
    groups = transforms.get("config_groups") or {}
    if any(transforms.values()) and not groups:
        raise CheckpointError("quantization_config.transform_config has no config_groups. Use another checkpoint.")
    for name, scheme in groups.items():
        places = [each.get("location") for each in scheme.get("apply") or ()]
        online = [place for place in places if place not in _STORED_ROTATIONS]
        if online:
            raise CheckpointError(
                f"quantization_config.transform_config rotates {online[0]} while the model runs ({name}), which MLX "
                "checkpoints do not hold. Use a checkpoint of the same model without, or the unquantized one."
            )


def _packed(base: str, words: TensorInfo, settings: Json, tensors: Tensors) -> PackedMatrix:
    scales, shape = (required(tensors, f"{base}.{part}", base) for part in ("weight_scale", "weight_shape"))
    expect_shape(shape, (2,), base)
    (rows, width), (_, groups) = matrix_shape(words), matrix_shape(scales)
    stated = _stated_bits(settings) if is_elsewhere(shape) else None
    N, K = (rows, width * 32 // stated) if stated else (int(size) for size in np.array(shape.read()))
    bits = width * 32 // max(K, 1)
    said = {each for weights in _weights(settings) if (each := weights.get("num_bits")) is not None} or {*_BITS}
    if bits not in said & {*_BITS} or width != -(-K * bits // 32):
        raise CheckpointError(
            f"{words.name} has shape {list(words.shape)} for {N} × {K} weights, which makes {bits} bits; expected "
            f"{' or '.join(map(str, sorted(said)))} as num_bits says, of 2 to 8 without gaps between words. Use "
            "another checkpoint of the same model."
        )
    expect_shape(words, (N, width), base)
    expect_shape(scales, (N, groups), base)
    zero_points, g_idx = tensors.get(f"{base}.weight_zero_point"), tensors.get(f"{base}.weight_g_idx")
    group_size = _group_size(base, settings, bits, scales, K)
    if zero_points is not None:
        expect_shape(zero_points, (-(-N * bits // 32), groups), base)
    if g_idx is not None:
        expect_shape(g_idx, (K,), base)
    return PackedMatrix(
        shape=(N, K),
        bits=bits,
        group_size=group_size,
        parts=_parts(base, tensors, words, scales, zero_points, g_idx),
        order=None if g_idx is None else act_order(g_idx, group_size, groups),
        stored_words=words,
        stored_scales=scales,
        zero_points=zero_points,
    )


def _int8(base: str, weight: TensorInfo, tensors: Tensors) -> Int8Matrix:
    scales, zero_points = required(tensors, f"{base}.weight_scale", base), tensors.get(f"{base}.weight_zero_point")
    (N, K), by_rows = matrix_shape(weight), [scales, *([] if zero_points is None else [zero_points])]
    for info in by_rows:
        if info.shape not in ((), (1,)):
            expect_shape(info, (N, 1), base)
    return Int8Matrix(
        shape=(N, K),
        bits=8,
        group_size=K,
        parts=_parts(base, tensors, weight, scales, zero_points),
        order=None,
        weight=weight,
        stored_scales=scales,
        zero_points=zero_points,
    )


def _fp8(base: str, weight: TensorInfo, settings: Json, tensors: Tensors) -> Matrix:
    scale = required(tensors, f"{base}.weight_scale", base)
    block: tuple[int, int] | None = None
    if scale.shape == (weight.shape[0], 1):
        block = (1, weight.shape[1])
    elif len(scale.shape) == 2:
        block = _block_structure(settings)
    return block_scaled(weight, scale, block, _parts(base, tensors))


def _fp4(base: str, packed: TensorInfo, tensors: Tensors) -> FloatMatrix:
    rows, columns = matrix_shape(packed)
    scale = required(tensors, f"{base}.weight_scale", base)
    if _has_exponents(base, tensors):
        expect_shape(scale, (rows, 2 * columns // MX_GROUP), base)
        return FloatMatrix(packed, scale, None, MX_GROUP, _parts(base, tensors))
    global_scale = required(tensors, f"{base}.weight_global_scale", base)
    expect_shape(scale, (rows, 2 * columns // FP4_GROUP), base)
    if scale.dtype != E4M3:
        raise CheckpointError(
            f"{scale.name} has dtype {scale.dtype}, expected {E4M3} as NVFP4 has or U8 as MXFP4 has. Use another "
            "checkpoint of the model."
        )
    return FloatMatrix(packed, scale, global_scale, FP4_GROUP, _parts(base, tensors))


def _mxfp8(base: str, weight: TensorInfo, settings: Json, tensors: Tensors) -> FloatMatrix:
    (rows, columns), scale = matrix_shape(weight), tensors[f"{base}.weight_scale"]
    expect_shape(scale, (rows, columns // MX_GROUP), base)
    return FloatMatrix(weight, scale, None, MX_GROUP, _parts(base, tensors))


def _has_exponents(base: str, tensors: Tensors) -> bool:
    """Whether the scales of a module are e8m0, as the MX formats have them."""
    scale = tensors.get(f"{base}.weight_scale")
    return scale is not None and scale.dtype in EXPONENTS


def _groups(settings: Json) -> list[Json]:
    """The groups of config.json."""
    return list((settings.get("config_groups") or {}).values())


def _weights(settings: Json) -> list[Json]:
    """What the groups of config.json say of their weights."""
    return [group.get("weights") or {} for group in _groups(settings)]


def _block_structure(settings: Json) -> tuple[int, int] | None:
    size = next((size for weights in _weights(settings) if (size := weights.get("block_structure"))), None)
    return None if size is None else (size[0], size[1])


def _stated_bits(settings: Json) -> int | None:
    """The bits of every packed module, where config.json names one number for all."""
    bits = [weights.get("num_bits") for weights in _weights(settings)]
    first = bits[0] if bits and all(each == bits[0] for each in bits) else None
    return first if first and first > 0 else None


def _group_size(base: str, settings: Json, bits: int, scales: TensorInfo, K: int) -> int:
    """The group size that config.json states of modules of so many bits and that makes so many scales.

    One for all inputs is a channel's; a tensor's may come as one a row too. Raises CheckpointError where it states
    none that does, or several.
    """
    groups = scales.shape[1]
    alike = [weights for weights in _weights(settings) if weights.get("num_bits") in (bits, None)]
    stated = [weights.get("group_size") for weights in alike]
    if groups == 1 and (None in stated or -1 in stated or not stated):
        return K
    sizes: set[int] = {size for size in stated if size is not None and size > 0}
    fitting = {size for size in sizes if -(-K // size) == groups}
    if not sizes:
        return stated_group_size(None, scales, groups, K)
    if len(fitting) != 1:
        shown = " or ".join(map(str, sorted(fitting or sizes)))
        raise CheckpointError(
            f"{scales.name} in {scales.file.name} has {groups} groups for the {K} inputs of {base}, config.json says "
            f"group_size {shown}. The file is damaged, or config.json belongs to other weights: download the folder "
            "again."
        )
    return min(fitting.pop(), K)


def _parts(base: str, tensors: Tensors, *used: TensorInfo | None) -> tuple[TensorInfo, ...]:
    """The tensors `used`, and those of the module that only matter to its activations or its shape."""
    unused = (tensors.get(f"{base}.{name}") for name in _UNUSED)
    return tuple(info for info in (*used, *unused) if info is not None)


def _whole_blocks(words: mx.array, bits: int) -> mx.array:
    """The words [..., W], with zeros behind them up to where codes and words end together."""
    return mx.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % block(bits)[1])])


def _rows(info: TensorInfo, start: int, stop: int) -> mx.array:
    """Rows of a column [N, 1], or of the one number that stands for every row, in fp32."""
    if len(info.shape) == 2:
        return info.read(start, stop).astype(mx.float32)
    return mx.broadcast_to(replace(info, shape=(1, 1)).read().astype(mx.float32), (stop - start, 1))
