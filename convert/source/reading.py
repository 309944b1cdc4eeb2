"""The plan of a source's tensors, with an adapter merged where there is one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.checkpoint.layout import Plan
from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.config import ModelConfig

from .adapters import read_adapter, unmerged
from .merging import merged


@dataclass(frozen=True, slots=True)
class Read:
    """What a source holds: its tensors, and the folder of the adapter that is merged into them."""

    plan: Plan
    adapter: Path | None = None
    remarks: tuple[str, ...] = ()


def read_source(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    planned: Callable[[dict[str, TensorInfo]], Plan],
    adapter_path: str | Path | None = None,
) -> Read:
    """What `planned` makes of the `tensors` of `folder`, with the adapter that lies among them or is named merged.

    Raises ConfigError and CheckpointError for adapters that cannot be read, or do not fit the model.
    """
    plain, adapter = unmerged(folder, tensors, config)
    plan = planned(plain)
    if adapter is not None:
        plan = merged(plan, adapter)
    if adapter_path is not None:
        adapter = read_adapter(resolve(adapter_path), plan.config)
        plan = merged(plan, adapter)
    if adapter is None:
        return Read(plan)
    name = adapter.folder.resolve().name
    return Read(plan, adapter.folder, (f"The adapter {name} is merged, which changes {adapter.count} tensors.",))
