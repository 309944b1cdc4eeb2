"""mlx-lm's model of the same configuration, with the same weights, for comparisons in one process."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_qwen.assembly import Matrix, assemble
from mlx_qwen.config import ModelConfig
from mlx_qwen.model import Model
from mlx_qwen.tensors import Role, tensor_specs, text_prefix


def random_pair(config: ModelConfig) -> tuple[Model, Any]:
    """Our model and mlx-lm's, in fp32 with equal random weights; `config` has no MTP layer and no vision tower."""
    weights = _random_weights(config)
    prefix = text_prefix(config)
    ours = Model(config)
    tensors = {name.removeprefix(prefix).removesuffix(".weight"): Matrix(array) for name, array in weights.items()}
    assemble(ours, tensors, interleaved=config.is_next)
    theirs = peer_model(config)
    theirs.load_weights(list(weights.items()))
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


def _random_weights(config: ModelConfig) -> dict[str, mx.array]:
    mx.random.seed(0)
    weights = {}
    for spec in tensor_specs(config):
        scale = 0.1 if len(spec.shape) == 1 else spec.shape[-1] ** -0.5
        noise = scale * mx.random.normal(spec.shape)
        weights[spec.name] = noise + 1 if spec.role in (Role.SHIFTED_NORM, Role.PLAIN_NORM) else noise
    return weights
