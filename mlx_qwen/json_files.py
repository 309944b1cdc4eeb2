"""The JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from mlx_qwen.errors import CheckpointError, MLXQwenError

# The largest published indexes take 20 MB.
MOST_BYTES = 200 << 20


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
