"""The images and videos of one or more requests, through the vision tower into the places of their placeholders."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_qwen.engine.sequence import Request
from mlx_qwen.media.grids import Kind
from mlx_qwen.model import Model
from mlx_qwen.model.multimodal import Embedded, Pixels
from mlx_qwen.model.state import HybridCache


def embedded(
    model: Model, tokens: mx.array, cache: HybridCache, requests: Sequence[Request], *, mask: mx.array | None = None
) -> Embedded | None:
    """What the decoder takes instead of `tokens` [B, T], one row a request; None when no request has media."""
    pixels = []
    for kind in (Kind.IMAGE, Kind.VIDEO):
        parts = [media.patches for request in requests for media in request.inputs.media if media.kind is kind]
        if parts:
            values = mx.concatenate([patches.pixel_values for patches in parts])
            pixels.append(Pixels(kind, values, mx.concatenate([patches.grid_thw for patches in parts])))
    return model.embed(tokens, pixels, cache, mask=mask) if pixels else None
