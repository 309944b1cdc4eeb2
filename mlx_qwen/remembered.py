"""What was found out about this machine or a checkpoint once and need not be found out again: small JSON files.

Each thing has a file of its own in the user's cache folder, replaced in one go, so that writers never meet in one. A
file that is missing or damaged, and a folder that cannot be written, mean that it is found out again.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def recall(name: str) -> dict[str, Any]:
    """What `remember` kept under `name`; an empty dict where there is nothing that can be read."""
    try:
        content = json.loads(_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}
    return content if isinstance(content, dict) else {}


def remember(name: str, content: Mapping[str, object]) -> bool:
    """Keep `content`, of JSON types, under `name`, a relative path; returns whether that was possible."""
    try:
        file = _file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(content, indent=2) + "\n")
            Path(part).replace(file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError):
        return False
    return True


def _file(name: str) -> Path:
    """Raises RuntimeError where the user has no home."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # as the XDG base directory specification asks
        base = Path.home() / ".cache"
    return base / "mlx-qwen" / f"{name}.json"
