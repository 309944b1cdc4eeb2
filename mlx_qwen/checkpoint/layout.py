"""Checkpoint layouts: every tensor of a folder is mapped onto a name in `names`, ignored by name, or an error.

Two layouts are read: Hugging Face's (unshifted norms, `model.language_model.…`, fused or per-expert MoE weights) and
MLX's (as mlx-lm, mlx-vlm and this package write it). The result is a plan made from headers alone; nothing is read yet.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import mlx.core as mx

from mlx_qwen.checkpoint.adapters import check_merged
from mlx_qwen.checkpoint.leftovers import sorted_out
from mlx_qwen.checkpoint.mismatch import mismatch
from mlx_qwen.checkpoint.names import MTP_PREFIX, VISION_PREFIX, Role, TensorSpec, tensor_specs
from mlx_qwen.checkpoint.settled import settled
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.checkpoint.stored_names import mlx_name
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]
FORMAT_KEY = "mlx_qwen"
FORMAT_VERSION = 1
_FLOATS = ("BF16", "F16", "F32", "F64")
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_MODES_WITHOUT_BIASES: dict[tuple[int, int], Mode] = {(4, 32): "mxfp4", (8, 32): "mxfp8", (4, 16): "nvfp4"}
_WAYS = (
    "affine (2 to 6 or 8 bits, groups of 32, 64 or 128, float scales and biases), or with U8 scales mxfp4 (4 bits, "
    "32), mxfp8 (8, 32) or nvfp4 (4, 16)"
)


class Layout(Enum):
    """How a folder names and arranges its tensors."""

    HUGGING_FACE = "Hugging Face"
    MLX = "MLX"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How MLX packed one weight matrix; `group_size` counts input columns that share a scale."""

    bits: int
    group_size: int
    mode: Mode = "affine"


@dataclass(frozen=True, slots=True)
class Source:
    """One stored matrix: a whole tensor, or expert `index` of a fused one, of which `rows` are used."""

    tensor: TensorInfo
    index: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def matrix(self) -> TensorInfo:
        """The whole stored matrix, all leading axes counted as rows."""
        return (self.tensor if self.index is None else self.tensor.entry(self.index)).as_rows()


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor to produce in MLX layout: from one source, or stacked from one source an expert.

    `shift` says that 1 must be added to get the stored factor. `quantization`, `scales` and `biases` are set when
    the source is an MLX-quantized matrix.
    """

    spec: TensorSpec
    sources: tuple[Source, ...]
    shift: bool = False
    quantization: Quantization | None = None
    scales: TensorInfo | None = None
    biases: TensorInfo | None = None

    @property
    def stacked(self) -> bool:
        """Whether each source is one entry along the leading (expert) axis."""
        return self.spec.role is Role.EXPERT and (len(self.sources) > 1 or self.sources[0].index is not None)

    def arrange(self, array: mx.array) -> mx.array:
        """Bring one source's array [as stored, rows already taken] into MLX layout; norms become fp32 factors 1 + w."""
        if self.spec.role is Role.CONV and array.shape[1:] != self.spec.shape[1:]:
            return array.moveaxis(2, 1)
        if self.spec.role is Role.VISION and array.ndim == 5 and array.shape != self.spec.shape:
            return array.transpose(0, 2, 3, 4, 1)
        return array.astype(mx.float32) + 1 if self.shift else array


@dataclass(frozen=True, slots=True)
class Plan:
    """How to read one checkpoint: its layout and every tensor that it holds of those its config asks for.

    `config` is the checkpoint's as its tensors have it: see `settled`.
    """

    config: ModelConfig
    layout: Layout
    targets: tuple[Target, ...]
    ignored: tuple[str, ...]

    @property
    def has_mtp(self) -> bool:
        return any(target.spec.name.startswith(MTP_PREFIX) for target in self.targets)

    @property
    def has_head(self) -> bool:
        """Whether the head has weights of its own."""
        return any(target.spec.role is Role.HEAD for target in self.targets)

    @property
    def has_vision(self) -> bool:
        return any(target.spec.role is Role.VISION for target in self.targets)


def plan_checkpoint(
    config: ModelConfig, tensors: dict[str, TensorInfo], companion: dict[str, TensorInfo] | None = None
) -> Plan:
    """Map `tensors` (and, where it has the same tensor more exactly, `companion`) onto the tensors of `config`.

    The vision tower and the MTP layer may be absent as a whole. Raises CheckpointError when tensors are missing,
    unknown or misshapen, with the names grouped and the likely cause.
    """
    check_merged(tensors)
    named = _named({**tensors, **(companion or {})}, config)
    layout = detect_layout(config, named)
    config, named = settled(config, named)
    pool, specs = Pool(named), tensor_specs(config)
    targets, missing = [], []
    for spec in specs:
        target = pool.target(spec, shift=layout is Layout.HUGGING_FACE and spec.role is Role.SHIFTED_NORM)
        if target is None:
            missing.append(spec.name)
        else:
            targets.append(target)
    missing = [name for name in missing if not _absent_as_a_whole(name, targets)]
    ignored, unknown = sorted_out(pool.left, pool.tensors, (spec.name for spec in specs), config)
    if missing or unknown:
        raise CheckpointError(mismatch(config, missing, unknown))
    check_shapes(targets)
    return Plan(config, layout, tuple(targets), tuple(ignored))


def _named(tensors: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors by their MLX names; raises CheckpointError where two go by one."""
    named: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        known = mlx_name(name, config)
        if known in named:
            raise CheckpointError(
                f"{named[known].name} and {name} are the same tensor, {known}, under two names. Remove the files of "
                "one of them."
            )
        named[known] = info
    return named


def detect_layout(config: ModelConfig, tensors: dict[str, TensorInfo]) -> Layout:
    """MLX or Hugging Face, by the convolution's axis order, which decides whether the norms are already shifted."""
    kernel = config.text.linear_conv_kernel_dim
    shapes = {info.shape[1:] for name, info in tensors.items() if name.endswith("linear_attn.conv1d.weight")}
    if shapes == {(kernel, 1)}:
        return Layout.MLX
    if shapes == {(1, kernel)}:
        return Layout.HUGGING_FACE
    raise CheckpointError(
        f"The linear_attn.conv1d.weight tensors end in {sorted(shapes)}, expected all (1, {kernel}) as Hugging Face "
        f"stores them or all ({kernel}, 1) as MLX does. The config belongs to another model, or layers are missing."
    )


class Pool:
    """The stored tensors under their MLX names; what no target takes is left over."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
        self.left = set(tensors)

    def target(self, spec: TensorSpec, *, shift: bool) -> Target | None:
        """What makes the tensor `spec`, None where nothing does."""
        info = self._take(spec.name)
        if info is not None:
            return self._whole(spec, info, shift)
        if spec.role is Role.EXPERT:
            return self._fused_experts(spec) or self._single_experts(spec)
        return None

    def _take(self, name: str) -> TensorInfo | None:
        self.left.discard(name)
        return self.tensors.get(name)

    def _whole(self, spec: TensorSpec, info: TensorInfo, shift: bool) -> Target:
        base = spec.name.removesuffix(".weight")
        scales, biases = self._take(f"{base}.scales"), self._take(f"{base}.biases")
        quantization = None if scales is None else infer_quantization(spec, info, scales, biases)
        return Target(spec, (Source(info),), shift, quantization, scales, biases)

    def _fused_experts(self, spec: TensorSpec) -> Target | None:
        mlp, projection = _expert_parts(spec.name)
        stored = f"{mlp}.experts." + ("down_proj" if projection == "down_proj" else "gate_up_proj")
        info = self._take(stored)
        if info is None:
            return None
        experts, rows, columns = spec.shape
        stored_rows = rows if projection == "down_proj" else 2 * rows
        _expect_shape(info, (experts, stored_rows, columns))
        first = rows if projection == "up_proj" else 0
        return Target(spec, tuple(Source(info, i, (first, first + rows)) for i in range(experts)))

    def _single_experts(self, spec: TensorSpec) -> Target | None:
        mlp, projection = _expert_parts(spec.name)
        found = [self._take(f"{mlp}.experts.{i}.{projection}.weight") for i in range(spec.shape[0])]
        if not all(found):
            return None
        infos = [info for info in found if info is not None]
        if infos[0].dtype == "U32":
            raise CheckpointError(
                f"{infos[0].name} in {infos[0].file.name} is packed apart from the other experts, as AutoRound's "
                f"export for MLX does. `mlx-qwen convert --hf-path {infos[0].file.parent}` stacks them."
            )
        for info in infos:
            _expect_shape(info, spec.shape[1:])
        return Target(spec, tuple(Source(info) for info in infos))


def infer_quantization(
    spec: TensorSpec, weight: TensorInfo, scales: TensorInfo, biases: TensorInfo | None
) -> Quantization:
    """Bits, group size and mode of an MLX-packed matrix, from the shapes and dtypes that it was stored with."""
    if weight.dtype != "U32" or not weight.shape or not scales.shape:
        raise CheckpointError(
            f"{weight.name} in {weight.file.name} is {weight.dtype} {list(weight.shape)} with scales "
            f"{scales.dtype} {list(scales.shape)}, expected matrices of words (U32) and their scales. Convert again."
        )
    mode: Mode | None = None
    columns = spec.shape[-1]
    bits, group_size = weight.shape[-1] * 32 // columns, columns // max(scales.shape[-1], 1)
    if scales.dtype == "U8" and biases is None:
        mode = _MODES_WITHOUT_BIASES.get((bits, group_size))
    elif biases is not None and {scales.dtype, biases.dtype} <= set(_FLOATS):
        mode = "affine" if bits in _BITS and group_size in _GROUPS else None
    if mode is None:
        missing = f"no {weight.name.removesuffix('.weight')}.biases"
        raise CheckpointError(
            f"{weight.name} in {weight.file.name} has {bits} bits, groups of {group_size}, {scales.dtype} scales and "
            f"{missing if biases is None else f'{biases.dtype} biases'}, expected a way that MLX packs: {_WAYS}. "
            "Convert again."
        )
    return Quantization(bits, group_size, mode)


def _expert_parts(name: str) -> tuple[str, str]:
    mlp, _, rest = name.partition(".switch_mlp.")
    return mlp, rest.removesuffix(".weight")


def _expect_shape(info: TensorInfo, shape: tuple[int, ...]) -> None:
    if info.shape != shape:
        raise CheckpointError(
            f"{info.name} in {info.file.name} has shape {list(info.shape)}, expected {list(shape)} from config.json. "
            "The weights and the config belong to different models."
        )


def check_shapes(targets: Iterable[Target]) -> None:
    """Raise CheckpointError for a tensor whose shape or dtype is not what its place in the model needs."""
    for target in targets:
        info, shape = target.sources[0].tensor, target.spec.shape
        if target.quantization is not None:
            assert target.scales is not None, "a quantized target has scales"
            bits, group_size = target.quantization.bits, target.quantization.group_size
            _expect_shape(info, (*shape[:-1], shape[-1] * bits // 32))
            for part in (target.scales, target.biases):
                if part is not None:
                    _expect_shape(part, (*shape[:-1], shape[-1] // group_size))
            continue
        if info.dtype not in _FLOATS:
            raise CheckpointError(
                f"{info.name} in {info.file.name} has dtype {info.dtype}, expected one of {', '.join(_FLOATS)}. "
                "The checkpoint is packed for another runtime, or damaged."
            )
        if len(target.sources) == 1 and target.sources[0].index is None:
            stored = info.shape
            if target.spec.role is Role.CONV and stored == (shape[0], shape[2], shape[1]):
                continue
            if target.spec.role is Role.VISION and stored == (shape[0], *shape[-1:], *shape[1:-1]):
                continue
            _expect_shape(info, shape)


def _absent_as_a_whole(name: str, targets: list[Target]) -> bool:
    optional = next((prefix for prefix in (MTP_PREFIX, VISION_PREFIX) if name.startswith(prefix)), None)
    return optional is not None and not any(target.spec.name.startswith(optional) for target in targets)
