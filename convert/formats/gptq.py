"""GPTQ as AutoGPTQ and GPTQModel write it (`quant_method` gptq): bits 2, 3, 4 or 8, in any group size and order.

A module with K inputs and N outputs holds `qweight` int32 [K · bits / 32, N] (the first input in the lowest bits),
`scales` [groups, N], `qzeros` int32 [groups, N · bits / 32] and `g_idx` int32 [K], the group of each input. Symmetric
modules have the zero 2^(bits − 1), whatever is stored: writers disagree about that. For others format "gptq" stores
zeros less one, "gptq_v2" stores them as they are. `dynamic` says of single modules that they are plain, or what of the
settings differs there.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, and the formats named in https://github.com/ModelCloud/GPTQModel.
"""

import re
import warnings
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Tensors, expect_shape, is_elsewhere, matrix_shape, required
from .integers import IntegerMatrix, act_order, block, stated_group_size, unpack

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True)
class GPTQMatrix(IntegerMatrix):
    """One module; `zero_offset` is added to the stored zeros, within their bits, or None where nobody says which.

    `symmetric` modules have one zero, and a warning where another one is stored.
    `trusted` is a `g_idx` that was not read when the groups were taken to be consecutive.
    """

    qweight: TensorInfo
    qzeros: TensorInfo
    stored_scales: TensorInfo
    zero_offset: int | None
    symmetric: bool
    trusted: TensorInfo | None

    def words(self, start: int, stop: int) -> mx.array:
        """The stored words, turned: GPTQ packs along the inputs from the lowest bits on, as MLX does.

        Raises CheckpointError where the groups are not what they were taken to be.
        """
        if self.trusted is not None and act_order(self.trusted, self.group_size, self.stored_scales.shape[0]):
            raise CheckpointError(
                f"{self.trusted.name} says that the inputs are out of order, config.json says desc_act: false. Correct "
                "it there, or download the folder first and convert that."
            )
        return mx.contiguous(self.qweight.read_columns(start, stop).view(mx.uint32).T)

    def scales(self, start: int, stop: int) -> mx.array:
        return self.stored_scales.read_columns(start, stop).astype(mx.float32).T

    def zeros(self, start: int, stop: int) -> mx.array:
        count, width = block(self.bits)
        first = start // count
        words = self.qzeros.read_columns(first * width, -(-stop // count) * width).view(mx.uint32)
        stored = unpack(words, self.bits)[:, start - first * count : stop - first * count].astype(mx.uint32)
        if not self.symmetric:
            assert self.zero_offset is not None, "asked for before"
            return ((stored + self.zero_offset) & ((1 << self.bits) - 1)).astype(mx.float32).T
        middle = 1 << (self.bits - 1)
        known = (middle - 1, middle) if self.zero_offset is None else (middle - self.zero_offset,)
        if not any(mx.all(stored == zero) for zero in known):
            warnings.warn(
                f"quantization_config says sym: true, which means the zero point {middle} for {self.bits} bits; that "
                "is used, though the zero points stored say another. Compare the output with the original.",
                stacklevel=2,
            )
        return mx.full((stop - start, stored.shape[0]), float(middle))


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module with a `qweight`; raises CheckpointError for other GPTQ formats and misshapen tensors."""
    named = [settings[key] for key in ("checkpoint_format", "format") if settings.get(key) is not None]
    if len(set(named)) > 1 or any(kind not in _ZERO_OFFSETS for kind in named):
        raise CheckpointError(
            f"quantization_config.checkpoint_format is {' and '.join(map(repr, named))}, expected one of "
            f"{', '.join(_ZERO_OFFSETS)}. Save the model in one of these, or use the unquantized checkpoint."
        )
    offset = _ZERO_OFFSETS[named[0]] if named else None
    return packed_matrices(tensors, settings, offset, in_order=settings.get("desc_act") is False)


def packed_matrices(
    tensors: Tensors, settings: Json, zero_offset: int | None, *, in_order: bool, apart: str = "dynamic"
) -> dict[str, Matrix]:
    """Every module with a `qweight`; without `g_idx` its groups are consecutive.

    `in_order` says that they are in any case, which a `g_idx` that is not on this machine is trusted to say too.
    `apart` is the field of settings that holds those of single modules.
    """
    bases = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    rules = settings.get(apart) or {}
    return {base: _matrix(base, tensors, _settings_of(base, settings, rules), zero_offset, in_order) for base in bases}


def _settings_of(base: str, settings: Json, rules: Json) -> Json:
    """The settings of one module: those of all, but for what the first rule that names it says of it."""
    for pattern, changed in rules.items():
        if not pattern.startswith("-:") and _names(pattern, base):
            return {**settings, **changed}
    return settings


def _names(pattern: str, module: str) -> bool:
    pattern = pattern.removeprefix("+:")
    try:
        return pattern == module or re.match(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(
            f"quantization_config has the pattern {pattern!r}, which is no regular expression ({error}). Correct it "
            "there."
        ) from error


def _matrix(base: str, tensors: Tensors, settings: Json, zero_offset: int | None, in_order: bool) -> GPTQMatrix:
    qweight, qzeros, scales = (required(tensors, f"{base}.{part}", base) for part in ("qweight", "qzeros", "scales"))
    g_idx = tensors.get(f"{base}.g_idx")
    (words, N), (groups, _), (_, zeros) = (matrix_shape(info) for info in (qweight, scales, qzeros))
    K = words * N // zeros if g_idx is None else max(prod(g_idx.shape), 1)
    bits, stated = words * 32 // max(K, 1), settings.get("bits")
    if bits not in _BITS or (stated is not None and bits != stated):
        expected = " or ".join(map(str, _BITS)) if stated is None else f"{stated}, as config.json says"
        raise CheckpointError(
            f"{qweight.name} has shape {list(qweight.shape)} for {K} inputs, which makes {bits} bits; expected "
            f"{expected}. Use another checkpoint of the same model."
        )
    expect_shape(qweight, (K * bits // 32, N), base)
    expect_shape(scales, (groups, N), base)
    expect_shape(qzeros, (groups, N * bits // 32), base)
    group_size = stated_group_size(settings.get("group_size"), scales, groups, K)
    trusted = g_idx if g_idx is not None and in_order and is_elsewhere(g_idx) else None
    return GPTQMatrix(
        shape=(N, K),
        bits=bits,
        group_size=group_size,
        parts=(qweight, qzeros, scales, *([] if g_idx is None else [g_idx])),
        order=None if g_idx is None or trusted is not None else act_order(g_idx, group_size, groups),
        qweight=qweight,
        qzeros=qzeros,
        stored_scales=scales,
        zero_offset=_offset(settings, zero_offset),
        symmetric=settings.get("sym") is True,
        trusted=trusted,
    )


def _offset(settings: Json, zero_offset: int | None) -> int | None:
    """What is added to stored zeros; "gptq" where nobody says what, as it was the only format for long."""
    return zero_offset if zero_offset is not None or settings.get("sym") else _ZERO_OFFSETS["gptq"]
