"""Models that run one decoder layer at a time, for checkpoints larger than memory."""

from mlx_qwen.layerwise.model import LayerwiseModel, StreamedLayer, little_cache, open_layerwise
from mlx_qwen.layerwise.observing import LinearInput, Observer

__all__ = ["LayerwiseModel", "LinearInput", "Observer", "StreamedLayer", "little_cache", "open_layerwise"]
