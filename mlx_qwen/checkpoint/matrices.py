"""From planned tensors to matrices under module names, lazily: nothing is read before it is used."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Quantization, Source, Target
from mlx_qwen.checkpoint.names import EXACT_ROLES, MTP_PREFIX, text_prefix
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of a weight matrix [..., N, K], dense or packed; `bias` [N] belongs to the rows.

    `is_held` says that the arrays are in memory already, where what is made of them should take their place at once.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: Quantization | None = None
    bias: mx.array | None = None
    is_held: bool = False

    def select(self, pick: Callable[[mx.array], mx.array]) -> "Matrix":
        """The matrix with `pick` applied to the rows of each of its arrays."""
        return self.with_arrays({name: pick(x) for name, x in self.arrays().items()})

    def arrays(self) -> dict[str, mx.array]:
        """The arrays that there are, by field name; the rows of all of them correspond."""
        held = {"weight": self.weight, "scales": self.scales, "biases": self.biases, "bias": self.bias}
        return {name: x for name, x in held.items() if x is not None}

    def with_arrays(self, arrays: dict[str, mx.array]) -> "Matrix":
        """The same kind of matrix with other arrays."""
        scales, biases, bias = (arrays.get(name) for name in ("scales", "biases", "bias"))
        return replace(self, weight=arrays["weight"], scales=scales, biases=biases, bias=bias)

    def with_bias(self, bias: mx.array) -> "Matrix":
        """The matrix with the bias of its rows, [N]."""
        return replace(self, bias=bias)

    def dense(self) -> mx.array:
        """The weight itself, unpacked if need be, in the dtype of its scales."""
        if self.quantization is None or self.scales is None:
            return self.weight
        values = unpacked(self.weight, self.scales, self.biases, self.quantization)
        return values.astype(mx.bfloat16 if self.biases is None else self.scales.dtype)


Tensors = Mapping[str, Matrix]


def unpacked(weight: mx.array, scales: mx.array, biases: mx.array | None, quantization: Quantization) -> mx.array:
    """The values [..., K] of codes, scale · code + bias, in fp32.

    In the scales' own dtype, as `mx.dequantize` computes by itself, the product would be rounded before the sum.
    """
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    if biases is None:  # powers of two, and products that bf16 holds
        return mx.dequantize(weight, scales, None, group_size, bits, mode).astype(mx.float32)
    return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits, mode)


def read_matrices(targets: Iterable[Target], config: ModelConfig, dtype: mx.Dtype | None) -> dict[str, Matrix]:
    """The tensors of `targets` by module name without the language-model prefix, each with its bias.

    `dtype` is what unpacked weights, scales and biases become, their own by default; norms, A_log and dt_bias are fp32.
    """
    files = LazyFiles()
    tensors: dict[str, Matrix] = {}
    for target in targets:
        name = module_name(target.spec.name, config)
        matrix = lazy_matrix(target, files, dtype)
        if name.endswith(".bias"):
            base = name.removesuffix(".bias")
            tensors[base] = tensors[base].with_bias(matrix.weight)
        else:
            tensors[name.removesuffix(".weight")] = matrix
    return tensors


def module_name(name: str, config: ModelConfig) -> str:
    """A tensor's name without the language-model prefix."""
    return name if name.startswith(MTP_PREFIX) else name.removeprefix(text_prefix(config))


def read_rows(target: Target, first: int, last: int, dtype: mx.Dtype | None) -> Matrix:
    """Rows first:last of one tensor, as a matrix that is read at once.

    All axes but the last one count as rows: those of the experts' tensors [E, N, K] run on from expert to expert.
    `dtype` as in `read_matrices`.
    """
    if target.quantization is not None:
        infos = (target.sources[0].tensor, target.scales, target.biases)
        weight, scales, biases = (None if info is None else info.as_rows().read(first, last) for info in infos)
        assert weight is not None, "a packed matrix has codes"
        return packed_matrix(target, weight, scales, biases, dtype)
    weight = _dense_rows(target, first, last)
    return Matrix(weight if dtype is None else weight.astype(dtype))


def _dense_rows(target: Target, first: int, last: int) -> mx.array:
    shape, info = target.spec.shape, target.sources[0].tensor
    if target.stacked:
        rows = shape[-2]
        spans = [
            (source, max(first - i * rows, 0), min(last - i * rows, rows))
            for i, source in enumerate(target.sources)
            if first < (i + 1) * rows and i * rows < last
        ]
        return mx.concatenate([_expert_rows(source, start, stop) for source, start, stop in spans])
    if len(shape) > 1 and info.shape == shape and not target.shift:
        return info.as_rows().read(first, last)
    return target.arrange(info.read()).reshape(-1, shape[-1])[first:last]


def _expert_rows(source: Source, start: int, stop: int) -> mx.array:
    """Rows start:stop of those that one expert's source has."""
    info = source.tensor if source.index is None else source.tensor.entry(source.index)
    offset = 0 if source.rows is None else source.rows[0]
    return info.read(offset + start, offset + stop)


def lazy_matrix(target: Target, files: "LazyFiles", dtype: mx.Dtype | None) -> Matrix:
    """One tensor, which is read when it is first used; `dtype` as in `read_matrices`."""
    if target.quantization is not None:
        scales, biases = (None if info is None else files[info] for info in (target.scales, target.biases))
        return packed_matrix(target, files[target.sources[0].tensor], scales, biases, dtype)
    weight = target.arrange(_dense(target, files))
    if target.spec.role in EXACT_ROLES:
        return Matrix(weight.astype(mx.float32))
    return Matrix(weight if dtype is None else weight.astype(dtype))


def packed_matrix(
    target: Target, weight: mx.array, scales: mx.array | None, biases: mx.array | None, dtype: mx.Dtype | None
) -> Matrix:
    """The packed matrix of these arrays of a target; `dtype` as in `read_matrices`."""
    if dtype is not None and scales is not None and biases is not None:  # only affine matrices have biases
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return Matrix(weight, scales, biases, target.quantization)


def _dense(target: Target, files: "LazyFiles") -> mx.array:
    sources = target.sources
    first = sources[0]
    if not target.stacked:
        return files[first.tensor]
    if first.index is None:
        return mx.stack([files[source.tensor] for source in sources])
    assert first.rows is not None, "experts of a fused tensor name their rows"
    return files[first.tensor][:, slice(*first.rows)]


class LazyFiles:
    """Tensors by where they lie; each file is opened once. Arrays that are computed from others are so at once."""

    def __init__(self) -> None:
        self._open: dict[Path, dict[str, mx.array]] = {}

    def __getitem__(self, info: TensorInfo) -> mx.array:
        if info.is_computed or info.dtype == "F64":  # which MLX has on a CPU alone, and reads nowhere
            return info.read()
        if info.file not in self._open:
            try:
                loaded = mx.load(str(info.file))
            except Exception as error:  # MLX's reader says of a header that this one takes whatever it stumbles over
                raise CheckpointError(
                    f"{info.file} cannot be read by MLX ({error}). Download it again, or convert the checkpoint."
                ) from error
            assert isinstance(loaded, dict), "a safetensors file loads as a dict"
            self._open[info.file] = loaded
        return self._open[info.file][info.name]
