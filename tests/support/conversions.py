"""What tests of chosen bits share: a source with one matrix that rounding hurts, and the bits of a description."""

import shutil
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.layout import Quantization
from mlx_qwen.convert import Description

HURT_LAYER = 1
_STORED = "model.language_model.layers.{}.linear_attn.out_proj.weight"


def hurt_source(source: Path, copy: Path) -> Path:
    """A copy whose `out_proj` of layer `HURT_LAYER` loses more by rounding than those of other layers."""
    shutil.copytree(source, copy)
    tensors = mx.load(str(copy / "model.safetensors"))
    assert isinstance(tensors, dict)
    name = _STORED.format(HURT_LAYER)
    # One large weight a group makes the steps between codes large, and the others' errors with them.
    outliers = mx.where(mx.arange(tensors[name].shape[1]) % 64 == 0, 8, 1)
    tensors[name] *= outliers.astype(mx.bfloat16)
    mx.save_safetensors(str(copy / "model.safetensors"), tensors)
    return copy


def out_proj_bits(description: Description) -> dict[int, int]:
    """The bits of `out_proj`, by linear layer."""
    found = chosen(description)
    name = "language_model.model.layers.{}.linear_attn.out_proj.weight"
    layers = range(len(found))
    return {i: kind.bits for i in layers if (kind := found.get(name.format(i))) is not None}


def chosen(description: Description) -> dict[str, Quantization | None]:
    """How each matrix is written."""
    return {tensor.name: tensor.quantization for tensor in description.tensors if tensor.kind.is_matrix}
