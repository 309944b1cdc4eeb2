"""Generating text: one answer, a stream of tokens, or a batch."""

from mlx_qwen.generation.batch import batch_generate
from mlx_qwen.generation.defaults import SamplingParameters, recommended_sampling
from mlx_qwen.generation.generate import generate, stream_generate
from mlx_qwen.generation.options import GenerationOptions
from mlx_qwen.generation.prompts import Prompt
from mlx_qwen.generation.response import GenerationResponse

__all__ = [
    "GenerationOptions",
    "GenerationResponse",
    "Prompt",
    "SamplingParameters",
    "batch_generate",
    "generate",
    "recommended_sampling",
    "stream_generate",
]
