"""Where images and videos come from: files, http(s) and data URLs, and bytes."""

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote

from mlx_qwen.errors import PromptError
from mlx_qwen.media.web import download

_FILE_URL = re.compile(r"file://(localhost(?=/))?", re.IGNORECASE)
_WEB_URL = re.compile("https?://", re.IGNORECASE)


def locate(source: str | Path | bytes, *, what: str, most_bytes: int) -> tuple[Path | bytes, str]:
    """A file's path or its bytes, and what to call it in errors; `what` is "image" or "video".

    Raises:
        PromptError: there is no such file, or a URL cannot be decoded, downloaded (see `download`), or holds more than
            `most_bytes`.
    """
    if isinstance(source, bytes | bytearray):
        return bytes(source), f"The {what} of {len(source):,} bytes"
    text = str(source)
    if not text:
        raise PromptError(f"The {what} is an empty text. Give a path, an http(s) or data URL, or the file's bytes.")
    if text[:5].lower() == "data:":
        return _from_data_url(text, what, most_bytes), f"The {what} in the data URL"
    if isinstance(source, str) and _WEB_URL.match(text):
        return download(text, most_bytes), text
    address = _FILE_URL.match(text)
    path = Path(unquote(text[address.end() :]) if address else text).expanduser()
    try:
        if path.exists() and not (
            path.is_file() or path.is_dir()
        ):  # opening a pipe would wait for its other end, and devices never end
            raise OSError("Is no file")
        with path.open("rb"):
            return path, str(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(
            f"The {what} {text:.200} cannot be read ({reason}). Give a path, an http(s) or data URL, or the file's "
            "bytes."
        ) from error


def _from_data_url(url: str, what: str, most_bytes: int) -> bytes:
    if len(url) > most_bytes * 4 // 3 + 1024:  # base64 makes four characters of three bytes
        raise PromptError(f"The {what} in the data URL is larger than {most_bytes >> 20} MB. Pass it as a file.")
    header, _, body = url.partition(",")
    example = "image/png" if what == "image" else "video/mp4"
    try:
        if not header.endswith(";base64"):
            raise ValueError("it does not say ;base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise PromptError(
            f"The data URL {url:.40}… cannot be decoded ({error}). Expected data:{example};base64,… with the file's "
            "bytes in base64."
        ) from error
