"""The vision tower over many small images at once, padded to the largest, instead of one attention call per image."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, cast

import torch
from torch.nn import functional
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import (
    Qwen3_5MoeVisionAttention,
    Qwen3_5MoeVisionBlock,
    Qwen3_5MoeVisionModel,
    rotate_half,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from tools.demo_training.fast.layers import Rotary, linear

Tensor = torch.Tensor
LAYERS_OF_IMAGES = 16  # the number of images is padded to a multiple, so that few shapes occur


class Packing(NamedTuple):
    """Where padded patches come from and go to.

    source: int64 [N, P], the row of pixel_values each patch shows (0 where padded); real: bool [N, P];
    taps, tap_weights: [N, P, 4], the position embeddings to interpolate; places: int64 [N, P, 2] for the rotary.
    """

    source: Tensor
    real: Tensor
    taps: Tensor
    tap_weights: Tensor
    places: Tensor


def pack(grids: list[tuple[int, int]], side: int, merge: int) -> Packing:
    """Plans images of `grids` (height and width in patches, multiples of `merge`), concatenated in this order."""
    patches = max(height * width for height, width in grids)
    images = -(-len(grids) // LAYERS_OF_IMAGES) * LAYERS_OF_IMAGES
    source, real = torch.zeros(images, patches, dtype=torch.int64), torch.zeros(images, patches, dtype=torch.bool)
    taps, tap_weights = torch.zeros(images, patches, 4, dtype=torch.int64), torch.zeros(images, patches, 4)
    places = torch.zeros(images, patches, 2, dtype=torch.int64)
    start = 0
    for image, (height, width) in enumerate(grids):
        count = height * width
        source[image, :count] = torch.arange(start, start + count)
        real[image, :count] = True
        taps[image, :count], tap_weights[image, :count], places[image, :count] = _grid(height, width, side, merge)
        start += count
    return Packing(source, real, taps, tap_weights, places)


def image_features(tower: Qwen3_5MoeVisionModel, pixels: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    """Features [merged tokens, out_hidden] of pixel_values [patches, channels * temporal * patch * patch]."""
    source, real, taps, tap_weights, places = packing
    embed = tower.patch_embed.proj
    x = linear(pixels.to(dtype)[source], embed.weight.flatten(1), embed.bias).float()
    x = x + (tower.pos_embed.weight[taps] * tap_weights[..., None]).sum(2)
    frequencies = (places[..., None].float() * tower.rotary_pos_emb.inv_freq).flatten(2)
    angles = torch.cat([frequencies, frequencies], dim=-1)[:, None]
    rotary = Rotary(angles.cos(), angles.sin())
    hidden = torch.zeros(real.shape).masked_fill(~real, -torch.inf)
    hidden[~real.any(1)] = 0.0
    bias = hidden[:, None, None]
    for block in cast("Iterable[Qwen3_5MoeVisionBlock]", tower.blocks):
        x = _block(block, x, rotary, bias, dtype)
    merger, unit = tower.merger, tower.spatial_merge_unit
    merged = _layer_norm(merger.norm, x, dtype).view(-1, unit * x.shape[-1])
    merged = functional.gelu(linear(merged, merger.linear_fc1.weight, merger.linear_fc1.bias))
    return linear(merged, merger.linear_fc2.weight, merger.linear_fc2.bias)[real.view(-1, unit)[:, 0]]


def _block(block: Qwen3_5MoeVisionBlock, x: Tensor, rotary: Rotary, bias: Tensor, dtype: torch.dtype) -> Tensor:
    x = x + _attention(block.attn, _layer_norm(block.norm1, x, dtype), rotary, bias)
    first, second = block.mlp.linear_fc1, block.mlp.linear_fc2
    inner = linear(_layer_norm(block.norm2, x, dtype), first.weight, first.bias)
    return x + linear(functional.gelu(inner, approximate="tanh"), second.weight, second.bias)


def _layer_norm(norm: torch.nn.LayerNorm, x: Tensor, dtype: torch.dtype) -> Tensor:
    return functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(dtype)


def _attention(module: Qwen3_5MoeVisionAttention, x: Tensor, rotary: Rotary, bias: Tensor) -> Tensor:
    N, P, _ = x.shape
    qkv = linear(x, module.qkv.weight, module.qkv.bias).view(N, P, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    turned = qkv[:2].float() * rotary.cosine + rotate_half(qkv[:2].float()) * rotary.sine
    query, key = turned.to(x.dtype)
    scores = (query @ key.mT).float() * module.scaling + bias
    out = scores.softmax(-1).to(x.dtype) @ qkv[2]
    return linear(out.transpose(1, 2).reshape(x.shape), module.proj.weight, module.proj.bias)


@cache
def _grid(height: int, width: int, side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    grid = torch.tensor([[1, height, width]])
    taps, weights = get_vision_interpolation_indices_and_weights(
        grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
    return taps, weights, get_vision_position_ids(grid, merge)
