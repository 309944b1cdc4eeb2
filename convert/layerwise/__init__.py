"""Models that run one decoder layer at a time, for checkpoints larger than memory."""

from .observing import LinearInput, Observer
from .streamed import LayerwiseModel, StreamedLayer, little_cache, open_layerwise

__all__ = ["LayerwiseModel", "LinearInput", "Observer", "StreamedLayer", "little_cache", "open_layerwise"]
