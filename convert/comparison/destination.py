"""Whether a file can be written, asked before the work that fills it."""

from pathlib import Path
from tempfile import TemporaryFile

from mlx_qwen.errors import ConversionError


def check_destination(path: Path) -> None:
    """Raise ConversionError unless a file can be written at `path`, which is tried and leaves nothing behind."""
    try:
        if path.exists():
            path.open("ab").close()
        else:
            with TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise ConversionError(
            f"{path} cannot be written ({error.strerror}). Choose a file in a folder that exists and that you may "
            "write to."
        ) from error
