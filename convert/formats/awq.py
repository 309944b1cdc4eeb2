"""AWQ in its "gemm" packing, as AutoAWQ writes it (`quant_method` awq): 4 bits with a zero a group.

A module with K inputs and N outputs holds `qweight` int32 [K, N / 8], `scales` [groups, N] and `qzeros` int32
[groups, N / 8]. A word holds eight neighbouring outputs, from the lowest bits on those at 0, 2, 4, 6, 1, 3, 5 and 7.

Source: Lin et al., "AWQ", arXiv 2306.00978, and the packing of https://github.com/casper-hansen/AutoAWQ.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import Json
from mlx_qwen.errors import CheckpointError

from .encoded import Matrix, Tensors, expect_shape, matrix_shape, required
from .integers import IntegerMatrix, pack, stated_group_size, unpack

_BITS, _FIELDS = 4, 8
# Where in its word each of eight neighbouring outputs lies.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class AWQMatrix(IntegerMatrix):
    """One module."""

    qweight: TensorInfo
    qzeros: TensorInfo
    stored_scales: TensorInfo

    def words(self, start: int, stop: int) -> mx.array:
        return pack(_outputs(self.qweight, start, stop).T, _BITS)

    def scales(self, start: int, stop: int) -> mx.array:
        return self.stored_scales.read_columns(start, stop).astype(mx.float32).T

    def zeros(self, start: int, stop: int) -> mx.array:
        return _outputs(self.qzeros, start, stop).astype(mx.float32).T


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module with a `qweight`; raises CheckpointError for other packings and misshapen tensors."""
    version, bits = str(settings.get("version", "gemm")).lower(), settings.get("bits", settings.get("w_bit", _BITS))
    if version != "gemm" or bits != _BITS:
        raise CheckpointError(
            f"quantization_config says {bits} bits in version {version!r}, expected 4 bits in 'gemm', the packing that "
            "is published. Use another checkpoint of the same model."
        )
    bases = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    group_size = settings.get("group_size", settings.get("q_group_size"))
    return {base: _matrix(base, tensors, group_size) for base in bases}


def _matrix(base: str, tensors: Tensors, group_size: object) -> AWQMatrix:
    qweight, qzeros, scales = (required(tensors, f"{base}.{part}", base) for part in ("qweight", "qzeros", "scales"))
    (K, words), (groups, _) = matrix_shape(qweight), matrix_shape(scales)
    expect_shape(scales, (groups, words * _FIELDS), base)
    expect_shape(qzeros, (groups, words), base)
    return AWQMatrix(
        shape=(words * _FIELDS, K),
        bits=_BITS,
        group_size=stated_group_size(group_size, scales, groups, K),
        parts=(qweight, qzeros, scales),
        order=None,
        qweight=qweight,
        qzeros=qzeros,
        stored_scales=scales,
    )


def _outputs(stored: TensorInfo, start: int, stop: int) -> mx.array:
    """The codes of outputs start:stop, uint8 [inputs or groups, outputs]."""
    first = start // _FIELDS
    words = stored.read_columns(first, -(-stop // _FIELDS)).view(mx.uint32)
    in_words = unpack(words[..., None], _BITS)
    in_order = mx.take(in_words, mx.array(_PLACES), axis=-1).flatten(-2)
    return in_order[:, start - first * _FIELDS : stop - first * _FIELDS]
