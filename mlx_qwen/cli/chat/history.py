"""Where what was typed is kept between sessions: a file that only its user reads."""

import os
import re
from pathlib import Path

VARIABLE = "MLX_QWEN_HISTORY"
_MOST_BYTES = 4 << 20


def history_file() -> Path | None:
    """The file, made where it is missing and cut to its newer half where it has grown large; None for no history.

    `MLX_QWEN_HISTORY` is another file, or 0 for none.
    """
    chosen = os.environ.get(VARIABLE, "")
    if chosen.lower() in ("0", "off", "no", "false"):
        return None
    try:
        file = Path(chosen).expanduser() if chosen else _state_folder() / "history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
        _shorten(file)
    except (OSError, RuntimeError):
        return None
    return file


def _state_folder() -> Path:
    """Raises RuntimeError where the user has no home."""
    base = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not base.is_absolute():  # as the XDG base directory specification asks
        base = Path.home() / ".local" / "state"
    return base / "mlx-qwen"


def _shorten(file: Path) -> None:
    if file.stat().st_size <= _MOST_BYTES:
        return
    newer = file.read_bytes()[-_MOST_BYTES // 2 :]
    begins = re.search(rb"^# ", newer, re.MULTILINE)
    file.write_bytes(newer[begins.start() :] if begins else b"")
