"""The images of one or more requests, through the vision tower into the places of their placeholders."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_qwen.cache import HybridCache
from mlx_qwen.generation.request import Request
from mlx_qwen.model import Model
from mlx_qwen.model.embedding import Embedded, Pixels
from mlx_qwen.model.mrope import Kind


def embedded(
    model: Model, tokens: mx.array, cache: HybridCache, requests: Sequence[Request], *, mask: mx.array | None = None
) -> Embedded | None:
    """What the decoder takes instead of `tokens` [B, T], one row a request; None when no request has images."""
    images = [request.inputs.images for request in requests if request.inputs.images is not None]
    if not images:
        return None
    values = mx.concatenate([patches.pixel_values for patches in images])
    pixels = Pixels(Kind.IMAGE, values, mx.concatenate([patches.grid_thw for patches in images]))
    return model.embed(tokens, [pixels], cache, mask=mask)
