"""The vision tower: from patches of pixels to embeddings that stand between those of the text.

Source: transformers' `Qwen3_5VisionModel`; Bai et al., "Qwen3-VL Technical Report" (2025).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen.config import VisionConfig
from mlx_qwen.media.grids import Grid
from mlx_qwen.model.layers import AnyLinear

_EPS = 1e-6
# Scores of all heads that a CPU holds at once; a GPU's fused kernel holds none. So memory grows with an image's area,
# not with its square.
_SCORES = 1 << 23
_FUSED_HEAD_DIMS = (64, 80, 128)


class LayerNorm(nn.Module):
    """Layer norm of the fp32 stream, in the precision of the weights that follow."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = mx.ones(size)
        self.bias = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        """fp32 x [..., size] to the weights' dtype."""
        weight, bias = self.weight.astype(mx.float32), self.bias.astype(mx.float32)
        return mx.fast.layer_norm(x, weight, bias, _EPS).astype(self.weight.dtype)


class VisionMLP(nn.Module):
    """Two projections around a tanh-approximated GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear_fc1: AnyLinear = nn.Linear(width, inner)
        self.linear_fc2: AnyLinear = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        output: mx.array = self.linear_fc2(nn.gelu_approx(self.linear_fc1(x)))
        return output


class VisionAttention(nn.Module):
    """Attention among the patches of one image or one temporal pair of frames."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.qkv: AnyLinear = nn.Linear(width, 3 * width)
        self.proj: AnyLinear = nn.Linear(width, width)

    def __call__(self, x: mx.array, grids: Sequence[Grid], rotation: tuple[mx.array, mx.array]) -> mx.array:
        """x [N, width] to the same shape; `rotation` holds cos and sin, fp32 [N, 1, head_dim / 2]."""
        N = x.shape[0]
        q, k, v = mx.split(self.qkv(x).reshape(N, 3 * self.num_heads, self.head_dim), 3, axis=1)
        q, k = _rotated(q, *rotation), _rotated(k, *rotation)
        attended, first = [], 0
        for frames, patches in _batches(grids, self.num_heads):
            part = slice(first, first + frames * patches)
            heads = [y[part].reshape(frames, patches, *y.shape[1:]).swapaxes(1, 2) for y in (q, k, v)]
            attended.append(self._attend(*heads).swapaxes(1, 2).reshape(frames * patches, -1))
            first += frames * patches
        output: mx.array = self.proj(mx.concatenate(attended))
        return output

    def _attend(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Softmax attention of [frames, heads, S, head_dim], a bounded number of queries at a time."""
        D, S = self.head_dim, q.shape[2]
        fused = next((size for size in _FUSED_HEAD_DIMS if size >= D), D)
        if fused > D:
            # MLX has fused kernels for these sizes only; zeros change neither scores nor values.
            q, k, v = (mx.pad(x, [(0, 0), (0, 0), (0, 0), (0, fused - D)]) for x in (q, k, v))
        step = S if _on_gpu() else max(64, _SCORES // (S * self.num_heads))
        parts = []
        for i in range(0, S, step):
            parts.append(mx.fast.scaled_dot_product_attention(q[:, :, i : i + step], k, v, scale=D**-0.5))
            if step < S:
                mx.eval(parts)
        return mx.concatenate(parts, axis=2)[..., :D]


def _on_gpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.gpu)


def _batches(grids: Sequence[Grid], num_heads: int) -> Iterator[tuple[int, int]]:
    """Frames that attend at once, as neighbours of one shape are rows of one batch, and the patches of each."""
    for (rows, columns), same in groupby(grids, key=lambda grid: (grid.rows, grid.columns)):
        frames, patches = sum(grid.frames for grid in same), rows * columns
        most = frames if _on_gpu() else max(1, _SCORES // (patches**2 * num_heads))
        for first in range(0, frames, most):
            yield min(most, frames - first), patches


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a layer norm; the residual stream is fp32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size)
        self.norm2 = LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, grids: Sequence[Grid], rotation: tuple[mx.array, mx.array]) -> mx.array:
        x = x + self.attn(self.norm1(x), grids, rotation)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Makes one embedding of the text model's width from a square of neighbouring patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._width = config.hidden_size * config.spatial_merge_size**2
        self.norm = LayerNorm(config.hidden_size)
        self.linear_fc1: AnyLinear = nn.Linear(self._width, self._width)
        self.linear_fc2: AnyLinear = nn.Linear(self._width, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """fp32 x [N, hidden], squares of patches in a row, to [N / merge², out_hidden_size]."""
        output: mx.array = self.linear_fc2(nn.gelu(self.linear_fc1(self.norm(x).reshape(-1, self._width))))
        return output


class VisionTower(nn.Module):
    """Images and videos to embeddings; memory is linear in their area.

    `patch_embed` is the checkpoint's convolution as a matrix over whole patches, `pos_embed` a square table.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.patch_embed = nn.Linear(pixels, config.hidden_size)
        self.pos_embed = mx.zeros((config.num_position_embeddings, config.hidden_size))
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = PatchMerger(config)

    def __call__(self, pixel_values: mx.array, grids: Sequence[Grid]) -> mx.array:
        """Embeddings [N / merge², out_hidden_size] in the weights' dtype, grid after grid.

        Args:
            pixel_values: [N, channels · temporal_patch_size · patch_size²], normalised, squares of patches in a row.
            grids: of the images and videos that the N patches belong to, in order.
        """
        head_dim = self.config.hidden_size // self.config.num_heads
        coordinates = np.concatenate([_coordinates(grid, self.config.spatial_merge_size) for grid in grids])
        rotation = _rotation(coordinates, head_dim, self.config.theta)
        x = self.patch_embed(pixel_values.astype(self.patch_embed.weight.dtype)).astype(mx.float32)
        x = x + self._position_embeddings(coordinates, grids)
        for block in self.blocks:
            x = block(x, grids, rotation)
            mx.eval(x)  # the next block's activations take the place of this one's
        return self.merger(x)

    def _position_embeddings(self, coordinates: np.ndarray, grids: Sequence[Grid]) -> mx.array:
        """The table stretched over each grid, corners on corners, bilinearly: fp32 [N, hidden]."""
        side = int(self.config.num_position_embeddings**0.5)
        sizes = np.repeat([[grid.rows, grid.columns] for grid in grids], [grid.patches for grid in grids], axis=0)
        places = coordinates.astype(np.float32) * np.float32(side - 1) / np.maximum(sizes - 1, 1).astype(np.float32)
        low = np.floor(places).astype(np.int64)
        high = np.minimum(low + 1, side - 1)
        upper = places - low
        total = mx.array(0.0)
        for row, row_weight in ((low[:, 0], 1 - upper[:, 0]), (high[:, 0], upper[:, 0])):
            for column, column_weight in ((low[:, 1], 1 - upper[:, 1]), (high[:, 1], upper[:, 1])):
                weight = mx.array((row_weight * column_weight)[:, None])
                total = total + self.pos_embed[mx.array(row * side + column)] * weight
        return total


def _coordinates(grid: Grid, merge: int) -> np.ndarray:
    """Row and column of every patch, int [patches, 2], in the order of the squares that are merged."""
    places = np.stack(np.meshgrid(np.arange(grid.rows), np.arange(grid.columns), indexing="ij"), axis=-1)
    squares = places.reshape(grid.rows // merge, merge, grid.columns // merge, merge, 2).swapaxes(1, 2)
    return np.tile(squares.reshape(-1, 2), (grid.frames, 1))


def _rotation(coordinates: np.ndarray, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """cos and sin fp32 [N, 1, head_dim / 2]: half of the pairs turn with the row, the others with the column."""
    half = head_dim // 2
    frequencies = 1 / np.float32(theta) ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
    angles = coordinates[:, :, None].astype(np.float32) * frequencies
    turns = mx.array(angles.reshape(len(coordinates), 1, half))
    return mx.cos(turns), mx.sin(turns)


def _rotated(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """x [N, heads, head_dim] with its halves turned in fp32, in x's own dtype."""
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
