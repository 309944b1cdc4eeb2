"""GPTQ as AutoGPTQ and GPTQModel write it (`quant_method` gptq): bits 2, 4 or 8, in any group size, act-order or not.

A module with K inputs and N outputs holds `qweight` int32 [K · bits / 32, N] (the first input in the lowest bits),
`scales` [groups, N], `qzeros` int32 [groups, N · bits / 32] and `g_idx` int32 [K], the group of each input. Format
"gptq" stores zeros less one, "gptq_v2" stores them as they are. Modules that `dynamic` excludes are plain.

Source: Frantar et al., "GPTQ", arXiv 2210.17323, and the formats named in https://github.com/ModelCloud/GPTQModel.
"""

from dataclasses import dataclass
from math import prod

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Tensors, expect_shape, is_elsewhere, matrix_shape, required
from .integers import IntegerMatrix, act_order, unpack

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class GPTQMatrix(IntegerMatrix):
    """One module; `zero_offset` is added to the stored zeros, within their bits.

    `trusted` is a `g_idx` that was not read when the groups were taken to be consecutive.
    """

    qweight: TensorInfo
    qzeros: TensorInfo
    stored_scales: TensorInfo
    zero_offset: int
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
        fields = 32 // self.bits
        first = start // fields
        words = self.qzeros.read_columns(first, -(-stop // fields)).view(mx.uint32)
        codes = unpack(words, self.bits)[:, start - first * fields : stop - first * fields]
        return ((codes.astype(mx.uint32) + self.zero_offset) & ((1 << self.bits) - 1)).astype(mx.float32).T


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module with a `qweight`; raises CheckpointError for other GPTQ formats and misshapen tensors."""
    kind = settings.get("checkpoint_format", "gptq")
    if kind not in _ZERO_OFFSETS:
        raise CheckpointError(
            f"quantization_config.checkpoint_format is {kind!r}, expected one of {', '.join(_ZERO_OFFSETS)}. Save the "
            "model in one of these, or use the unquantized checkpoint."
        )
    return packed_matrices(tensors, _ZERO_OFFSETS[kind], in_order=settings.get("desc_act") is False)


def packed_matrices(tensors: Tensors, zero_offset: int, *, in_order: bool) -> dict[str, Matrix]:
    """Every module with a `qweight`; without `g_idx` its groups are consecutive.

    `in_order` says that they are in any case, which a `g_idx` that is not on this machine is trusted to say too.
    """
    bases = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    return {base: _matrix(base, tensors, zero_offset, in_order) for base in bases}


def _matrix(base: str, tensors: Tensors, zero_offset: int, in_order: bool) -> GPTQMatrix:
    qweight, qzeros, scales = (required(tensors, f"{base}.{part}", base) for part in ("qweight", "qzeros", "scales"))
    g_idx = tensors.get(f"{base}.g_idx")
    (words, N), (groups, _), (_, zeros) = (matrix_shape(info) for info in (qweight, scales, qzeros))
    K = words * N // zeros if g_idx is None else max(prod(g_idx.shape), 1)
    bits = words * 32 // max(K, 1)
    if bits not in (2, 4, 8):
        raise CheckpointError(
            f"{qweight.name} has shape {list(qweight.shape)} for {K} inputs, which makes {bits} bits; expected 2, 4 or "
            "8. Use another checkpoint of the same model."
        )
    expect_shape(qweight, (K * bits // 32, N), base)
    expect_shape(scales, (groups, N), base)
    expect_shape(qzeros, (groups, N * bits // 32), base)
    group_size = -(-K // groups)
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
        zero_offset=zero_offset,
        trusted=trusted,
    )
