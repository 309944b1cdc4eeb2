from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.async_generation import generate_async, stream_generate_async
from mlx_qwen.conversation import Conversation
from mlx_qwen.convert import RECIPES as _RECIPES
from mlx_qwen.convert import Comparison as _Comparison
from mlx_qwen.convert import ConversionReport as _ConversionReport
from mlx_qwen.convert import Description as _Description
from mlx_qwen.convert import compare as _compare
from mlx_qwen.convert import convert as _convert
from mlx_qwen.convert import describe as _describe
from mlx_qwen.convert.planning import plan
from mlx_qwen.distributed.loading import load
from mlx_qwen.engine.state_files import load_prompt_cache, save_prompt_cache
from mlx_qwen.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    MLXQwenError,
    PlanningError,
    PromptError,
    ShardingError,
)
from mlx_qwen.generation import batch_generate, generate, stream_generate
from mlx_qwen.json_types import ToolCall
from mlx_qwen.options import GenerationOptions
from mlx_qwen.version import __version__

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Conversation",
    "ConversionError",
    "GenerationOptions",
    "GenerationResponse",
    "MLXQwenError",
    "PlanningError",
    "PromptError",
    "ShardingError",
    "ToolCall",
    "__version__",
    "batch_generate",
    "convert",
    "generate",
    "generate_async",
    "load",
    "load_prompt_cache",
    "plan",
    "save_prompt_cache",
    "stream_generate",
    "stream_generate_async",
]

class _Converter:
    RECIPES = _RECIPES
    Comparison = _Comparison
    ConversionReport = _ConversionReport
    Description = _Description
    compare = staticmethod(_compare)
    convert = staticmethod(_convert)
    describe = staticmethod(_describe)
    __call__ = staticmethod(_convert)

convert: _Converter
