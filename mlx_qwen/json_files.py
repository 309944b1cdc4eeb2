"""The JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from mlx_qwen.errors import CheckpointError, MLXQwenError

# The largest published indexes take 20 MB.
MOST_BYTES = 200 << 20
ADAPTER_CONFIG = "adapter_config.json"


def read_json_object(file: Path, error: type[MLXQwenError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that `file` holds; raises `error`, naming the file, when it holds anything else."""
    try:
        if not file.is_file():  # opening a pipe would wait for its other end
            raise OSError("it is no file")
        if file.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MB")
        content = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as cause:
        raise error(f"{file} may not be read ({cause}). Give yourself the right to read it.") from cause
    except (OSError, ValueError, RecursionError) as cause:
        raise error(f"{file} cannot be read as JSON ({cause}). Download it again.") from cause
    if not isinstance(content, dict):
        raise error(f"{file} holds a {type(content).__name__}, expected a JSON object. Download it again.")
    return content


def adapter_advice(folder: Path) -> str:
    """What to say of a folder without config.json that holds an adapter alone; empty for any other."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return ""
    return f" It is an adapter, not a model{base_of_adapter(folder)}. {merging_advice(folder)}"


def merging_advice(folder: Path) -> str:
    """How an adapter in `folder` is merged into its model."""
    base = _named_base(folder)
    return (
        f"Merge it first: `mlx-qwen convert --hf-path {base or '<its base>'} --adapter-path {folder}` does while it "
        "converts, or `peft` with PeftModel.from_pretrained(base, adapter).merge_and_unload() and "
        "save_pretrained(new_folder)."
    )


def base_of_adapter(folder: Path) -> str:
    """The model that an adapter in `folder` names as its base, as the end of a sentence; empty where none is named."""
    base = _named_base(folder)
    return f"; its base is {base}" if base else ""


def _named_base(folder: Path) -> str | None:
    """The model that adapter_config.json names: PEFT as base_model_name_or_path, mlx-lm as model."""
    file = folder / ADAPTER_CONFIG
    settings = read_json_object(file, CheckpointError) if file.is_file() else {}
    base = settings.get("base_model_name_or_path") or settings.get("model")
    return base if isinstance(base, str) else None
