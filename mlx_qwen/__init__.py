"""Run the Qwen3.5 models on Apple silicon.

    model, processor = mlx_qwen.load("Qwen/Qwen3.5-0.8B")          # nothing given: a tiny model that comes along
    print(mlx_qwen.generate(model, processor, [{"role": "user", "content": "Hello"}]))

`stream_generate` gives an answer as it is written, `batch_generate` gives several together, and a `Conversation` turn
after turn; `stream_generate_async` and `generate_async` are for asyncio. `convert` writes a checkpoint for MLX,
quantized; `plan` says whether a model fits a machine. Every error that is raised on purpose is an `MLXQwenError`.
"""

from importlib import import_module

from mlx_qwen.command_buffers import set_limits
from mlx_qwen.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    MLXQwenError,
    PlanningError,
    PromptError,
    ShardingError,
)
from mlx_qwen.version import __version__

# MLX reads them with its first operation.
set_limits()

# Where the public names live that are imported when they are first used: `mlx-qwen --help` need not wait for MLX.
_HOMES = {
    "Conversation": "conversation",
    "GenerationOptions": "options",
    "GenerationResponse": "answer.response",
    "ToolCall": "json_types",
    "batch_generate": "generation",
    "convert": "convert",
    "generate": "generation",
    "generate_async": "async_generation",
    "load": "distributed.loading",
    "load_prompt_cache": "engine.state_files",
    "plan": "convert.planning",
    "save_prompt_cache": "engine.state_files",
    "stream_generate": "generation",
    "stream_generate_async": "async_generation",
}

__all__ = [  # noqa: PLE0604, the names of _HOMES come with __getattr__
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "MLXQwenError",
    "PlanningError",
    "PromptError",
    "ShardingError",
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(f"mlx_qwen.{_HOMES[name]}")
    return home if name == "convert" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
