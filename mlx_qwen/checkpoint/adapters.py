"""Adapters of a fine-tuning that lie within or beside the weights that they change, and are not merged into them."""

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import ADAPTER_CONFIG, base_of_adapter, merging_advice

ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors")
_UNMERGED = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b"
    r"|\.lora_[ab]$"
)


def check_merged(tensors: Mapping[str, TensorInfo]) -> None:
    """Raise CheckpointError, which says how to merge, when some of the tensors are those of an unmerged adapter."""
    found = next((name for name in tensors if _UNMERGED.search(name)), None)
    if found is None:
        return
    folder = tensors[found].file.parent
    raise CheckpointError(
        f"{folder} holds {found}, of an adapter not merged into its model{base_of_adapter(folder)}. "
        f"{merging_advice(folder)} Where both factors and {ADAPTER_CONFIG} lie in the model's own folder, `mlx-qwen "
        "convert` merges them without --adapter-path."
    )


def warn_of_adapter(folder: Path, names: Collection[str] = ()) -> None:
    """Warn when an adapter lies beside a whole model, which is read without it; `names` are files to come."""
    held = {*names, *(path.name for path in folder.iterdir())}
    if ADAPTER_CONFIG in held and held & {*ADAPTER_FILES}:
        warnings.warn(
            f"{folder} holds an adapter beside the model, which is left out. `mlx-qwen convert --hf-path {folder} "
            f"--adapter-path {folder}` merges it.",
            stacklevel=5,
        )
