"""Stored tensors that no part of the model takes: which of them cannot change a logit, and which must be an error."""

import re
import warnings
from collections.abc import Iterable, Mapping

import mlx.core as mx

from mlx_qwen.checkpoint.mismatch import grouped
from mlx_qwen.checkpoint.names import MTP_PREFIX, VISION_PREFIX
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig

# Computed from the config by every reader.
_COMPUTED = ("inv_freq", "cos_cached", "sin_cached")
# Scales of quantized activations and key-value caches, and heads for other tasks.
_SCALES = re.compile(r".*(?:^|[._])(?:k|v|q|kv|qkv|prob|input|output)_(?:scale|zero_point|scale_inv)$")
_HEADS = re.compile(r"(?:score|v_head|value_head|reward_head|classifier)\.")


def sorted_out(
    left: Iterable[str], tensors: Mapping[str, TensorInfo], wanted: Iterable[str], config: ModelConfig
) -> tuple[list[str], list[str]]:
    """The tensors `left` over, by MLX name, as those that have no effect and those that nobody knows, as stored.

    `wanted` are the names of the model's own. Those without effect are named in one warning, but for what every reader
    computes.
    """
    unwanted: tuple[str, ...] = () if config.text.mtp_num_hidden_layers else (MTP_PREFIX,)
    unwanted += () if config.vision is not None else (VISION_PREFIX,)
    weights = set(wanted)
    computed: list[str] = []
    useless: list[str] = []
    unknown: list[str] = []
    for name in sorted(left):
        info = tensors[name]
        if name.endswith(_COMPUTED):
            computed.append(info.name)
        elif name.startswith(unwanted) or _SCALES.match(name) or _HEADS.match(name) or _is_no_bias(info, name, weights):
            useless.append(info.name)
        else:
            unknown.append(info.name)
    if useless and not unknown:
        warnings.warn(
            f"{len(useless)} tensors of the checkpoint are left out, as config.json asks for none of them and they do "
            f"not change the logits of text:\n{grouped(useless)}",
            stacklevel=4,
        )
    return computed + useless, unknown


def _is_no_bias(info: TensorInfo, name: str, weights: set[str]) -> bool:
    """Whether the tensor is a bias of zeros, of a matrix that has none in this family."""
    is_bias = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in weights
    return is_bias and not mx.any(info.actual.read()).item()
