"""The checkpoint that a speed comparison runs on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.errors import MLXQwenError


@dataclass(frozen=True, slots=True)
class Subject:
    """A model folder that every runtime can load, what to call it, and what should be said of it."""

    folder: Path
    name: str
    notes: tuple[str, ...]


def subject(model: str | None, revision: str | None, most_tokens: int, in_fp32: Callable[[Path], Path]) -> Subject:
    """The folder of `model`, by default the bundled demo.

    On a CPU, weights in 16 bits are compared in fp32: MLX's CPU backend has no 16-bit matrices of experts.

    Args:
        model, revision: a folder or a Hub repository, and what of it.
        most_tokens: the longest prompt and what is written after it.
        in_fp32: makes a model folder whose weights are those of another in fp32.

    Raises:
        MLXQwenError: the model cannot be found or read, or `most_tokens` are more than its context.
    """
    if model is None:
        folder, name = demo_folder(), "the bundled demo"
    else:
        folder, name = resolve(model, revision=revision), Path(model).name
    config = ModelConfig.from_directory(folder)
    limit = config.text.max_position_embeddings
    if most_tokens > limit:
        raise MLXQwenError(
            f"The longest prompt and what is generated after it are {most_tokens:,} tokens, but {name} has a context "
            f"of {limit:,}. Ask for fewer with --prompt-tokens and --generate-tokens."
        )
    if mx.default_device() == mx.gpu or config.quantization is not None:
        return Subject(folder, name, (f"Model: {name}.",))
    return Subject(in_fp32(folder), name, (f"Model: {name}, in fp32, as MLX's CPU backend has no 16-bit experts.",))
