"""AWQ in its packings "gemm" and "gemv", as AutoAWQ writes it (`quant_method` awq): 4 bits with a zero a group.

A module with K inputs and N outputs holds `qweight` int32 [K, N / 8], `scales` [groups, N] and `qzeros` int32
[groups, N / 8]. A word holds eight neighbouring outputs, from the lowest bits on those at 0, 2, 4, 6, 1, 3, 5 and 7.

As "gemv" it holds `qweight` int32 [N, K / 8], `scales` [N, at least groups] and `qzeros` int32 [N, at least
groups / 8], all from the lowest bits on in order; what is behind the last group fills up.

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


@dataclass(frozen=True, slots=True)
class GEMVMatrix(IntegerMatrix):
    """One module, packed along its inputs as MLX packs them."""

    qweight: TensorInfo
    qzeros: TensorInfo
    stored_scales: TensorInfo

    def words(self, start: int, stop: int) -> mx.array:
        return self.qweight.read(start, stop).view(mx.uint32)

    def scales(self, start: int, stop: int) -> mx.array:
        return self.stored_scales.read(start, stop).astype(mx.float32)[:, : self._groups]

    def zeros(self, start: int, stop: int) -> mx.array:
        return unpack(self.qzeros.read(start, stop).view(mx.uint32), _BITS)[:, : self._groups].astype(mx.float32)

    @property
    def _groups(self) -> int:
        return -(-self.shape[1] // self.group_size)


def matrices(settings: Json, tensors: Tensors) -> dict[str, Matrix]:
    """Every module with a `qweight`; raises CheckpointError for other packings and misshapen tensors."""
    version, bits = (settings.get("version") or "gemm").lower(), _stated(settings, "bits", "w_bit") or _BITS
    if version not in ("gemm", "gemv") or bits != _BITS:
        raise CheckpointError(
            f"quantization_config says {bits} bits in version {version!r}, expected 4 bits in 'gemm' or 'gemv'. Use "
            "another checkpoint of the same model."
        )
    bases = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    group_size = _stated(settings, "group_size", "q_group_size")
    read = _matrix if version == "gemm" else _gemv
    return {base: read(base, tensors, group_size) for base in bases}


def _matrix(base: str, tensors: Tensors, group_size: int | None) -> AWQMatrix:
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


def _gemv(base: str, tensors: Tensors, group_size: int | None) -> GEMVMatrix:
    qweight, qzeros, scales = (required(tensors, f"{base}.{part}", base) for part in ("qweight", "qzeros", "scales"))
    (N, words), (_, width), (_, zeros) = (matrix_shape(info) for info in (qweight, scales, qzeros))
    K = words * _FIELDS
    size = K if group_size == -1 else group_size or 0
    if size < 1 or -(-K // size) > min(width, zeros * _FIELDS):
        raise CheckpointError(
            f"{scales.name} in {scales.file.name} has {width} groups for {K} inputs, config.json says group_size "
            f"{group_size}. The file is damaged, or config.json belongs to other weights: download the folder "
            "again."
        )
    expect_shape(scales, (N, width), base)
    expect_shape(qzeros, (N, zeros), base)
    return GEMVMatrix((N, K), _BITS, min(size, K), (qweight, qzeros, scales), None, qweight, qzeros, scales)


def _stated(settings: Json, *names: str) -> int | None:
    """The first of these that is stated."""
    return next((settings[name] for name in names if settings.get(name) is not None), None)


def _outputs(stored: TensorInfo, start: int, stop: int) -> mx.array:
    """The codes of outputs start:stop, uint8 [inputs or groups, outputs]."""
    first = start // _FIELDS
    words = stored.read_columns(first, -(-stop // _FIELDS)).view(mx.uint32)
    in_words = unpack(words[..., None], _BITS)
    in_order = mx.take(in_words, mx.array(_PLACES), axis=-1).flatten(-2)
    return in_order[:, start - first * _FIELDS : stop - first * _FIELDS]
