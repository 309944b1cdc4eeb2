"""Run the Qwen3.5 models on Apple silicon: `load` a checkpoint, then `generate` text from it."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen.answer.response import GenerationResponse
    from mlx_qwen.generation import batch_generate, generate, stream_generate
    from mlx_qwen.loading import load

__version__ = "0.1.0"

__all__ = ["GenerationResponse", "batch_generate", "generate", "load", "stream_generate"]

_HOMES = {
    "GenerationResponse": "answer.response",
    "batch_generate": "generation",
    "generate": "generation",
    "load": "loading",
    "stream_generate": "generation",
}


def __getattr__(name: str) -> object:
    """Import a public name or the converter when it is first used: `mlx-qwen --help` need not wait for MLX."""
    if name == "convert":
        return import_module("mlx_qwen.convert")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mlx_qwen.{_HOMES[name]}"), name)
