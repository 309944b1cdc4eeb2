"""From a caller's prompt to token ids, and the images and videos between them."""

from mlx_qwen.prompt.processor import Processor

__all__ = ["Processor"]
