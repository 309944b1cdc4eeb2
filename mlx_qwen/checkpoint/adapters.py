"""Adapters of a fine-tuning that were not merged into the weights they change, and how to merge them."""

import re
from collections.abc import Iterable
from pathlib import Path

from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import MERGING, base_of_adapter

_UNMERGED = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b"
    r"|\.lora_[ab]$"
)


def check_merged(names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError, which says how to merge, when tensors of `folder` are those of an unmerged adapter."""
    found = next((name for name in names if _UNMERGED.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{folder} holds {found}, of an adapter not merged into its model{base_of_adapter(folder)}. {MERGING}"
        )
