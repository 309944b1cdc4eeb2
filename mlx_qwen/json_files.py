"""The JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from mlx_qwen.errors import CheckpointError, MLXQwenError

# The largest published indexes take 20 MB.
MOST_BYTES = 200 << 20
_ADAPTER_CONFIG = "adapter_config.json"
MERGING = (
    "Merge it first, with `peft` and transformers: PeftModel.from_pretrained(base, adapter).merge_and_unload(), then "
    "save_pretrained(folder) and the base's tokenizer; give that folder."
)


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
    if not (folder / _ADAPTER_CONFIG).is_file():
        return ""
    return f" It is an adapter, not a model{base_of_adapter(folder)}. {MERGING}"


def base_of_adapter(folder: Path) -> str:
    """The model that an adapter in `folder` names as its base, as the end of a sentence; empty where none is named."""
    file = folder / _ADAPTER_CONFIG
    base = read_json_object(file, CheckpointError).get("base_model_name_or_path") if file.is_file() else None
    return f"; its base is {base}" if isinstance(base, str) and base else ""
