"""mlx-lm's model of the same configuration, with the same weights, for comparisons in one process."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.checkpoint.matrices import Matrix
from mlx_qwen.checkpoint.names import Role, tensor_specs, text_prefix
from mlx_qwen.config import ModelConfig
from mlx_qwen.model import Model
from mlx_qwen.model.weights import assemble

# Run before mlx-lm is imported: as its users install it, without torch, which transformers loads where it can.
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; "

_PACKED = (Role.EMBEDDING, Role.HEAD, Role.LINEAR, Role.EXPERT, Role.ROUTER)
_BARE = (".A_log.weight", ".dt_bias.weight")


def random_pair(config: ModelConfig, *, bits: int | None = None) -> tuple[Model, Any]:
    """Our model and mlx-lm's with equal random weights, fp32 or packed to `bits` bits in groups of 32.

    `config` has no MTP layer and no vision tower.
    """
    weights, prefix = _random_weights(config, bits), text_prefix(config)
    ours = Model(config)
    tensors = {name.removeprefix(prefix): matrix for name, matrix in weights.items()}
    assemble(ours, tensors, interleaved=config.is_next)
    theirs = peer_model(config)
    if bits is not None:
        packed = {name for name, matrix in weights.items() if matrix.quantization is not None}
        nn.quantize(theirs, 32, bits, class_predicate=lambda path, _: path in packed)
    arrays = {f"{name}.{part}": x for name, matrix in weights.items() for part, x in matrix.arrays().items()}
    theirs.load_weights(
        [(name.removesuffix(".weight") if name.endswith(_BARE) else name, x) for name, x in arrays.items()]
    )
    mx.eval(ours.parameters(), theirs.parameters())
    return ours, theirs


def peer_model(config: ModelConfig) -> Any:
    """mlx-lm's model of `config`, freshly initialised and not evaluated."""
    from importlib import import_module

    module = import_module(f"mlx_lm.models.{config.model_type.removesuffix('_text')}")
    return module.Model(module.ModelArgs.from_dict(config.raw))


def cache_arrays(cache: list[Any]) -> list[mx.array]:
    """Every array in a cache of mlx-lm."""
    leaves = [dict(tree_flatten(entry.state)) for entry in cache]
    return [array for arrays in leaves for array in arrays.values() if isinstance(array, mx.array)]


def _random_weights(config: ModelConfig, bits: int | None) -> dict[str, Matrix]:
    mx.random.seed(0)
    weights = {}
    for spec in tensor_specs(config):
        scale = 0.1 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        x = scale * mx.random.normal(spec.shape)
        if spec.role in (Role.SHIFTED_NORM, Role.PLAIN_NORM):
            x = x + 1
        packed = bits is not None and spec.role in _PACKED
        matrix = Matrix(*mx.quantize(x, 32, bits), Quantization(bits or 0, 32)) if packed else Matrix(x)
        weights[spec.name.removesuffix(".weight")] = matrix
    return weights
