"""Where images and videos come from: files, http(s) and data URLs, and bytes."""

import base64
import binascii
import re
from pathlib import Path
from urllib.parse import unquote
from urllib.request import Request, urlopen

from mlx_qwen.errors import PromptError

_SECONDS = 30
_FILE_URL = re.compile(r"file://(localhost(?=/))?", re.IGNORECASE)
_WEB_URL = re.compile("https?://", re.IGNORECASE)


def locate(source: str | Path | bytes, *, what: str, most_bytes: int) -> tuple[Path | bytes, str]:
    """A file's path or its bytes, and what to call it in errors; `what` is "image" or "video".

    Raises:
        PromptError: there is no such file, or a URL cannot be decoded, downloaded, or holds more than `most_bytes`.
    """
    if isinstance(source, bytes | bytearray):
        return bytes(source), f"The {what} of {len(source):,} bytes"
    text = str(source)
    if not text:
        raise PromptError(f"The {what} is an empty text. Give a path, an http(s) or data URL, or the file's bytes.")
    if text[:5].lower() == "data:":
        return _from_data_url(text, what), f"The {what} in the data URL"
    if isinstance(source, str) and _WEB_URL.match(text):
        return _download(text, most_bytes), text
    address = _FILE_URL.match(text)
    path = Path(unquote(text[address.end() :]) if address else text).expanduser()
    try:
        with path.open("rb"):
            return path, str(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(
            f"The {what} {text:.200} cannot be read ({reason}). Give a path, an http(s) or data URL, or the file's "
            "bytes."
        ) from error


def _from_data_url(url: str, what: str) -> bytes:
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


def _download(url: str, most_bytes: int) -> bytes:
    request = Request(url, headers={"User-Agent": "mlx-qwen"})
    try:
        with urlopen(request, timeout=_SECONDS) as response:
            data: bytes = response.read(most_bytes + 1)
    except (OSError, ValueError) as error:
        raise PromptError(f"{url} cannot be downloaded ({error}). Check the address, or pass a file.") from error
    if len(data) > most_bytes:
        raise PromptError(f"{url} is larger than {most_bytes >> 20} MB. Download it and pass the file.")
    return data
