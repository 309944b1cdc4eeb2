"""Opens what is compared: models that `load` takes, and those of other runtimes by the values that they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.layout import Plan
from mlx_qwen.checkpoint.shards import TensorInfo, checkpoint_tensors
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import plan_model

from ..formats import decodable
from ..layerwise import LayerwiseModel, little_cache
from ..source.reading import read_source


@contextmanager
def open_decoded(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: mx.Dtype | None = None,
    adapter_path: str | Path | None = None,
) -> Iterator[LayerwiseModel]:
    """As `mlx_qwen.convert.layerwise.open_layerwise`, and takes FP8, GPTQ, AWQ and compressed-tensors checkpoints too.

    Codes that MLX can hold stay packed; other matrices are decoded to fp32 while their layer is read. The adapter of
    `adapter_path` is merged.

    Raises:
        ConfigError: config.json is missing or describes no model of this family.
        CheckpointError: files are missing or damaged, or tensors do not match the config.
    """
    folder = resolve(path_or_repo, revision=revision)
    config = ModelConfig.from_directory(folder)

    def planned(tensors: dict[str, TensorInfo]) -> Plan:
        return plan_model(folder, config, decodable(config, tensors, keeps=lambda _: True))

    plan = read_source(folder, config, checkpoint_tensors(folder), planned, adapter_path).plan
    with little_cache():
        yield LayerwiseModel(plan, dtype=dtype)
