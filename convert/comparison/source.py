"""Opens what is compared: models that `load` takes, and those of other runtimes by the values that they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.shards import checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import plan_model

from ..formats import decodable
from ..layerwise import LayerwiseModel, little_cache


@contextmanager
def open_decoded(
    path_or_repo: str | Path, *, revision: str | None = None, dtype: mx.Dtype | None = None
) -> Iterator[LayerwiseModel]:
    """As `mlx_qwen.convert.layerwise.open_layerwise`, and takes FP8, GPTQ, AWQ and compressed-tensors checkpoints too.

    Codes that MLX can hold stay packed; other matrices are decoded to fp32 while their layer is read.

    Raises:
        ConfigError: config.json is missing or describes no model of this family.
        CheckpointError: files are missing or damaged, or tensors do not match the config.
    """
    folder = resolve(path_or_repo, revision=revision)
    config = ModelConfig.from_directory(folder)
    tensors = decodable(config, checkpoint_tensors(folder), keeps=lambda _: True)
    with little_cache():
        yield LayerwiseModel(plan_model(folder, config, tensors), dtype=dtype)
