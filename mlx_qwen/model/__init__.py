"""The Qwen3.5 model: blocks, decoder and the whole."""

from mlx_qwen.model.qwen import Model

__all__ = ["Model"]
