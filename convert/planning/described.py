"""The model that a plan is for: its configuration, and its tensors as the converter sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.foreign import foreign_quantization
from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.layout import Layout, Plan, Quantization, Source, Target, plan_checkpoint
from mlx_qwen.checkpoint.names import Role, TensorSpec, tensor_specs
from mlx_qwen.checkpoint.released import SIZES, released
from mlx_qwen.checkpoint.shards import TensorInfo, checkpoint_tensors, companion_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PlanningError

from ..formats import decodable
from ..settings import Settings

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


@dataclass(frozen=True, slots=True, eq=False)
class Described:
    """A model: its tensors are those of its files, or follow from its configuration when `has_files` is False.

    `tensors` gives them as the converter reads them for settings: where codes of another runtime are kept depends on
    what is asked for. `is_published` says that those of a configuration are unquantized, as they are published.
    """

    name: str
    config: ModelConfig
    tensors: Callable[[Settings], Plan]
    has_files: bool
    is_published: bool


def describe(model: str | Path, *, revision: str | None = None) -> Described:
    """The model of a folder, of a released size such as "35B-A3B", or of a Hub repository.

    A folder's safetensors headers are read, whatever runtime its weights are quantized for. Without such files and for
    a repository, the unquantized tensors follow from the configuration.

    Raises:
        PlanningError: a name that is none of these.
        ConfigError, CheckpointError: as `load` raises them.
    """
    name = str(model)
    is_folder = Path(model).expanduser().is_dir()
    if not is_folder and name in SIZES:
        return _released(name)
    if not is_folder and "/" not in name:
        raise PlanningError(
            f"{name!r} is no folder, no Hub repository such as Qwen/Qwen3.5-0.8B and no released size, "
            f"which are {', '.join(SIZES)}."
        )
    folder = resolve(model, revision=revision, weights=False)
    config = ModelConfig.from_directory(folder)
    if is_folder and any(folder.glob("*.safetensors")):
        return Described(name, config, _stored(config, folder), has_files=True, is_published=True)
    return _from_config(name, config)


def _stored(config: ModelConfig, folder: Path) -> Callable[[Settings], Plan]:
    """Tensors of a folder's files; decoded anew only where settings keep other codes than before."""
    stored, companion = checkpoint_tensors(folder), companion_tensors(folder)
    asked: set[Quantization] = set()
    plans: dict[frozenset[Quantization], Plan] = {}

    def kept(settings: Settings) -> frozenset[Quantization]:
        return frozenset(quantization for quantization in asked if settings.keeps(quantization))

    def tensors(settings: Settings) -> Plan:
        def keeps(quantization: Quantization) -> bool:
            asked.add(quantization)
            return settings.keeps(quantization)

        if kept(settings) not in plans:
            decoded = decodable(config, stored, keeps)
            plans[kept(settings)] = plan_checkpoint(config, decoded, companion)
        return plans[kept(settings)]

    return tensors


@cache
def _released(name: str) -> Described:
    """The released size of this name, whose tensors are the same whoever asks."""
    return _from_config(name, released(name))


def _from_config(name: str, config: ModelConfig) -> Described:
    """The tensors as Hugging Face publishes them: of the config's dtype, but A_log and the gated norm in fp32."""
    raw = {**config.raw, **config.raw.get("text_config", {})}
    dtype = _STORED.get(str(raw.get("dtype", raw.get("torch_dtype"))), "BF16")
    plan = Plan(config, Layout.HUGGING_FACE, tuple(_published(spec, dtype) for spec in tensor_specs(config)), ())
    is_published = config.quantization is None and foreign_quantization(config) is None
    return Described(name, config, lambda _: plan, has_files=False, is_published=is_published)


def _published(spec: TensorSpec, dtype: str) -> Target:
    stored = "F32" if spec.role is Role.PLAIN_NORM or spec.name.endswith(".A_log") else dtype
    nbytes = prod(spec.shape) * _MLX[stored].size
    info = _Unread(spec.name, Path(), stored, spec.shape, 0, nbytes)
    return Target(spec, (Source(info),), shift=spec.role is Role.SHIFTED_NORM)


class _Unread(TensorInfo):
    """A tensor known by its name alone, whose values are taken to need every bit of their dtype."""

    __slots__ = ()

    def read(self, start: int = 0, stop: int | None = None) -> mx.array:
        return mx.array([1 / 3]).astype(_MLX[self.dtype])
