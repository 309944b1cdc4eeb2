"""Launches of one decoded token's graph, counted the same way for this project's model and for mlx-lm's.

A launch is a node of the step's graph that runs a kernel on a GPU. Views do not count; a fused group, an `mx.fast`
operation and a Metal kernel count once; a copy that MLX makes of an input whose elements are not in order counts too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_qwen.bench.as_on_gpu import Launches, as_on_gpu, weightless
from mlx_qwen.bench.graph import COPY, count_copies, count_nodes
from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.matrices import Matrix
from mlx_qwen.checkpoint.names import Role, TensorSpec, tensor_specs, text_prefix
from mlx_qwen.checkpoint.released import reduced, released
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.recipes import uniform
from mlx_qwen.model import Model
from mlx_qwen.model.weights import assemble
from tools.benchmarks.peer import cache_arrays, peer_model

COUNTED_SIZES = ("0.8B", "9B", "35B-A3B")
_PERIOD = 4
_PACKED = Quantization(bits=4, group_size=64)
_RECIPE = uniform(_PACKED)
_FP32 = (Role.DECAY, Role.PLAIN_NORM, Role.SHIFTED_NORM)


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


@dataclass(frozen=True, slots=True)
class LaunchReport:
    """Launches of a decoded token by this project's model and by mlx-lm's of the same size, both at 4 bits."""

    size: str
    ours: LaunchCount
    peer: LaunchCount


def count_launches(size: str) -> LaunchReport:
    """Count the launches of the decode step of a released size such as "35B-A3B".

    One and two periods of layers of the real shapes are built without weights; the other layers are like them.

    Raises:
        ConfigError: no released size has this name.
    """
    periods = released(size).text.num_hidden_layers // _PERIOD
    one, two = (reduced(size, num_layers=count * _PERIOD, changes={}) for count in (1, 2))
    with as_on_gpu() as launches:
        ours = _scaled(_launches_of(_our_model(one), launches), _launches_of(_our_model(two), launches), periods)
        peer = _scaled(_launches_of(_their_model(one), launches), _launches_of(_their_model(two), launches), periods)
    return LaunchReport(size, ours, peer)


def bench_launches(sizes: Sequence[str] = COUNTED_SIZES) -> Table:
    """Launches of a decoded token for each size, beside mlx-lm's."""
    rows = []
    for size in sizes:
        report = count_launches(size)
        ours, peer = report.ours.total, report.peer.total
        rows.append((size, str(ours), str(peer), f"{peer / ours:.2f}"))
    note = "Nodes of the decode graph that run a kernel on a GPU, at 4 bits; copies of inputs included."
    return Table("Kernel launches of a decoded token", note, ("", OURS, PEER, "ratio"), rows)


def _scaled(one: Counter[str], two: Counter[str], periods: int) -> LaunchCount:
    period = two - one
    return LaunchCount(period, one - period, periods)


def _launches_of(model: Any, launches: Launches) -> Counter[str]:
    """Launches of the step that follows a short prompt."""

    def step() -> list[mx.array]:
        cache = model.make_cache()
        model(weightless((1, 2), mx.int32), cache=cache)
        _forget_history(cache)
        logits = model(weightless((1, 1), mx.int32), cache=cache)
        held = cache.arrays() if hasattr(cache, "arrays") else cache_arrays(cache)
        return [logits, *held]

    counted = count_nodes(step, launches)
    counted[COPY] = count_copies(step, launches)
    return +counted


def _forget_history(cache: Sequence[Any]) -> None:
    """Make every array of the cache an input of the next step's graph, whatever it was computed from."""
    for entry in cache:
        for name in getattr(entry, "__slots__", None) or vars(entry):
            value = getattr(entry, name)
            if isinstance(value, mx.array | list):
                setattr(entry, name, tree_map(_input_like, value))


def _input_like(array: Any) -> Any:
    return weightless(array.shape, array.dtype) if isinstance(array, mx.array) else array


def _our_model(config: ModelConfig) -> Any:
    model = Model(config)
    prefix = text_prefix(config)
    tensors = {spec.name.removeprefix(prefix).removesuffix(".weight"): _matrix(spec) for spec in tensor_specs(config)}
    assemble(model, tensors, interleaved=config.is_next)
    return _without_weights(model)


def _matrix(spec: TensorSpec) -> Matrix:
    packed = _RECIPE.precision(spec)
    if packed is None:
        return Matrix(weightless(spec.shape, mx.float32 if spec.role in _FP32 else mx.bfloat16))
    *rows, columns = spec.shape
    weight = weightless((*rows, columns * packed.bits // 32), mx.uint32)
    scales = weightless((*rows, columns // packed.group_size), mx.bfloat16)
    return Matrix(weight, scales, scales, packed)


def _their_model(config: ModelConfig) -> Any:
    model = peer_model(config)
    wanted = model.quant_predicate or (lambda *_: True)
    nn.quantize(
        model,
        _PACKED.group_size,
        _PACKED.bits,
        class_predicate=lambda path, module: hasattr(module, "to_quantized") and wanted(path, module),
    )
    model.eval()
    model.apply(lambda array: array.astype(mx.bfloat16) if array.dtype == mx.float32 else array)
    for layer in model.layers:
        if layer.is_linear:
            layer.linear_attn.A_log = layer.linear_attn.A_log.astype(mx.float32)
    return _without_weights(model)


def _without_weights(model: nn.Module) -> Any:
    model.update(tree_map(_input_like, model.parameters()))
    return model
