"""Launches of one decoded token's graph.

A launch is a node of the step's graph that runs a kernel on a GPU. Views do not count; a fused group, an `mx.fast`
operation and a Metal kernel count once; a copy that MLX makes of an input whose elements are not in order counts too.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_qwen.bench.as_on_gpu import Launches, as_on_gpu, weightless
from mlx_qwen.bench.graph import COPY, count_copies, count_nodes
from mlx_qwen.bench.table import Table
from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.matrices import Matrix
from mlx_qwen.checkpoint.names import Role, TensorSpec, tensor_specs, text_prefix
from mlx_qwen.checkpoint.released import reduced, released
from mlx_qwen.config import ModelConfig
from mlx_qwen.model import Model
from mlx_qwen.model.cache import HybridCache
from mlx_qwen.model.weights import assemble

COUNTED_SIZES = ("0.8B", "9B", "35B-A3B")
_PERIOD = 4
_FP32 = (Role.DECAY, Role.PLAIN_NORM, Role.SHIFTED_NORM)

# How a tensor is packed, if it is.
Precision = Callable[[TensorSpec], Quantization | None]


@dataclass(frozen=True, slots=True)
class LaunchCount:
    """Launches of one model, by name.

    Attributes:
        period: of three Gated DeltaNet layers and one of attention.
        ends: of everything around the layers.
        periods: how many periods the model has.
    """

    period: Counter[str]
    ends: Counter[str]
    periods: int

    @property
    def total(self) -> int:
        """Launches of a decoded token."""
        return self.ends.total() + self.periods * self.period.total()


def count_launches(size: str, precision: Precision, *, verified: int = 0) -> LaunchCount:
    """Count the launches of the decode step of a released size such as "35B-A3B".

    Args:
        size: its name.
        precision: how its matrices are packed.
        verified: count instead a step that reads so many drafted tokens and can be taken back in part.

    Raises:
        ConfigError: no released size has this name.
    """
    with as_on_gpu() as launches:
        return launches_of_size(
            size, lambda config: _model(config, precision), lambda cache: cache.arrays(), launches, verified
        )


def launches_of_size(
    size: str,
    build: Callable[[ModelConfig], Any],
    arrays_of: Callable[[Any], list[mx.array]],
    launches: Launches,
    verified: int = 0,
) -> LaunchCount:
    """Count the launches of a released size in any runtime.

    One and two periods of layers of the real shapes are built without weights; the other layers are like them.

    Args:
        size: its name.
        build: makes a runtime's model, without weights.
        arrays_of: the arrays that a cache of that runtime holds.
        launches: of the `as_on_gpu` that this is called in.
        verified: as of `count_launches`, for this project's own models.
    """
    periods = released(size).text.num_hidden_layers // _PERIOD
    one, two = (
        _launches_of(build(reduced(size, num_layers=count * _PERIOD, changes={})), arrays_of, launches, verified)
        for count in (1, 2)
    )
    period = two - one
    return LaunchCount(period, one - period, periods)


def launches_table(precision: Precision, sizes: Sequence[str] = COUNTED_SIZES) -> Table:
    """Launches of a decoded token for each size, where they come from, and those of a verified run of four."""
    rows = []
    for size in sizes:
        count, verified = (count_launches(size, precision, verified=tokens) for tokens in (0, 4))
        parts = (count.total, count.periods, count.period.total(), count.ends.total(), verified.total)
        rows.append((size, *map(str, parts)))
    header = ("", "launches", "groups of layers", "launches of each", "around them", "of 4 drafted tokens")
    note = (
        "Nodes of the decode graph that run a kernel on a GPU, at 4 bits; copies of inputs included. A group is three "
        "Gated DeltaNet layers and one of attention."
    )
    return Table("Kernel launches of a decoded token", note, header, rows)


def without_weights(model: nn.Module) -> Any:
    """The model with parameters of the same shapes that hold no memory."""
    model.update(tree_map(_input_like, model.parameters()))
    return model


def _launches_of(
    model: Any, arrays_of: Callable[[Any], list[mx.array]], launches: Launches, verified: int
) -> Counter[str]:
    """Launches of the step that follows a short prompt."""

    def step() -> list[mx.array]:
        cache = model.make_cache()
        model(weightless((1, 2), mx.int32), cache=cache)
        forget_history(cache)
        if verified:
            stepped = model.step(weightless((1, verified), mx.int32), cache.state, tape=True)
            taped = [array for layer in stepped.tape.layers for array in layer]
            return [model.logits(stepped.hidden), *stepped.state.arrays(), *taped]
        logits = model(weightless((1, 1), mx.int32), cache=cache)
        return [logits, *arrays_of(cache)]

    counted = count_nodes(step, launches)
    counted[COPY] = count_copies(step, launches)
    return +counted


def forget_history(cache: HybridCache | Sequence[Any]) -> None:
    """Make every array of a cache, this project's or mlx-lm's, an input of the next step's graph."""
    if isinstance(cache, HybridCache):
        cache.state = cache.state.mapped(_input_like)
        return
    for entry in cache:
        for name in getattr(entry, "__slots__", None) or vars(entry):
            value = getattr(entry, name)
            if isinstance(value, mx.array | list):
                setattr(entry, name, tree_map(_input_like, value))


def _input_like(array: Any) -> Any:
    return weightless(array.shape, array.dtype) if isinstance(array, mx.array) else array


def _model(config: ModelConfig, precision: Precision) -> Any:
    model = Model(config)
    prefix = text_prefix(config)
    tensors = {
        spec.name.removeprefix(prefix).removesuffix(".weight"): _matrix(spec, precision(spec))
        for spec in tensor_specs(config)
    }
    assemble(model, tensors, interleaved=config.is_next)
    return without_weights(model)


def _matrix(spec: TensorSpec, packed: Quantization | None) -> Matrix:
    if packed is None:
        return Matrix(weightless(spec.shape, mx.float32 if spec.role in _FP32 else mx.bfloat16))
    *rows, columns = spec.shape
    weight = weightless((*rows, columns * packed.bits // 32), mx.uint32)
    scales = weightless((*rows, columns // packed.group_size), mx.bfloat16)
    return Matrix(weight, scales, scales, packed)
