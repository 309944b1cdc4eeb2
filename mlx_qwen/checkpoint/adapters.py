"""Adapters of a fine-tuning that were not merged into the weights they change, and how to merge them."""

import re
from collections.abc import Iterable
from pathlib import Path

from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_files import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
_UNMERGED = re.compile(
    r"\.(?:base_layer|original_module|modules_to_save|lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b"
    r"|\.lora_[ab]$"
)
_MERGING = (
    "Merge it first, with `peft` and transformers: PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained(folder) and the base's tokenizer; give that folder."
)


def check_merged(names: Iterable[str], folder: Path) -> None:
    """Raise CheckpointError, which says how to merge, when tensors of `folder` are those of an unmerged adapter."""
    found = next((name for name in names if _UNMERGED.search(name)), None)
    if found is not None:
        raise CheckpointError(
            f"{folder} holds {found}, of an adapter that is not merged into its model{_of_base(folder)}. {_MERGING}"
        )


def adapter_advice(folder: Path) -> str:
    """What to say of a folder without config.json that holds an adapter alone; empty for any other."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return f" It is an adapter, not a model{_of_base(folder)}. {_MERGING}"


def _of_base(folder: Path) -> str:
    file = folder / ADAPTER_CONFIG
    base = read_json_object(file, CheckpointError).get("base_model_name_or_path") if file.is_file() else None
    return f"; its base is {base}" if isinstance(base, str) and base else ""
