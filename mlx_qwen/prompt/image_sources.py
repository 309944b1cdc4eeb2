"""Opens images from wherever they come, as upright RGB: files, URLs, bytes, pillow images and arrays."""

import base64
import binascii
import io
import re
import urllib.request
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mlx_qwen.errors import PromptError

# A path, an http(s) or data URL, an encoded file, a pillow image, or pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray

MOST_BYTES = 64 << 20
_SECONDS = 30
_BROKEN = (OSError, SyntaxError, ValueError, EOFError)


def open_image(source: ImageSource) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says, transparent parts on white; the first frame of animations.

    Integers of 16 bits are scaled to 8; floats in arrays and files count from 0 to 1.

    Raises:
        PromptError: the source cannot be found, read or decoded, has no pixels, or more than pillow's
            `Image.MAX_IMAGE_PIXELS` (89 million), which a small file can pretend to hold.
    """
    if isinstance(source, np.ndarray):
        return _rgb(_from_array(source))
    if isinstance(source, Image.Image):
        image, name = source, "The image"
    else:
        data, name = _read(source)
        image = _open(data, name)
    _check_size(image, name)
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except _BROKEN as error:
        raise PromptError(f"{name} is truncated or damaged ({error}). Save it again or download it anew.") from error


def _read(source: str | Path | bytes) -> tuple[bytes, str]:
    """The encoded image and what to call it in errors."""
    if isinstance(source, bytes | bytearray):
        return bytes(source), f"The image of {len(source):,} bytes"
    text = str(source)
    if text.startswith("data:"):
        return _from_data_url(text), "The image in the data URL"
    if isinstance(source, str) and re.match(r"https?://", text):
        return _download(text), text
    path = Path(text.removeprefix("file://")).expanduser()
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise PromptError(
            f"The image {text:.200} cannot be read ({error.strerror}). Give a path, an http(s) or data URL, the file's "
            "bytes, a pillow image or a numpy array."
        ) from error


def _from_data_url(url: str) -> bytes:
    header, _, body = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise ValueError("it does not say ;base64")
        return base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error) as error:
        raise PromptError(
            f"The data URL {url:.40}… cannot be decoded ({error}). Expected data:image/png;base64,… with the file's "
            "bytes in base64."
        ) from error


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mlx-qwen"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            data: bytes = response.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise PromptError(f"{url} cannot be downloaded ({error}). Check the address, or pass a file.") from error
    if len(data) > MOST_BYTES:
        raise PromptError(f"{url} is larger than {MOST_BYTES >> 20} MB. Download it and pass the file.")
    return data


def _open(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise PromptError(f"{name} is too large ({error}). Make it smaller first.") from error
    except _BROKEN as error:
        raise PromptError(f"{name} is no image that can be read. Expected PNG, JPEG, WebP, GIF or the like.") from error


def _check_size(image: Image.Image, name: str) -> None:
    pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise PromptError(f"{name} is {image.width} x {image.height} pixels large, expected at least 1 x 1.")
    if most is not None and pixels > most:
        raise PromptError(
            f"{name} has {pixels:,} pixels, more than {most:,}. Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "if you trust it."
        )


def _from_array(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise PromptError(
            f"The array has shape {list(shape)}, expected pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], channels "
            "last and at least 1 x 1."
        )
    return Image.fromarray(_to_8_bits(pixels.squeeze(2) if shape[2:] == (1,) else pixels))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint8 values of the same shape: booleans and floats from 0 to 1, wider integers as 16 bits when they exceed 8."""
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_ or np.issubdtype(pixels.dtype, np.floating):
        factor = 255.0
    else:
        factor = 1 / 257 if pixels.dtype == np.uint16 or pixels.max() > 255 else 1.0
    scaled = np.nan_to_num(pixels.astype(np.float64)) * factor
    return scaled.clip(0, 255).round().astype(np.uint8)
