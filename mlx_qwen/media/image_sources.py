"""Opens images from wherever they come, as upright RGB: files, URLs, bytes, pillow images and arrays."""

import io
import re
import struct
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mlx_qwen.errors import PromptError
from mlx_qwen.media.pixels import from_array
from mlx_qwen.media.sources import locate

# A path, an http(s) or data URL, an encoded file, a pillow image, or pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray

MOST_BYTES = 64 << 20
# Those that pillow decodes itself; others, EPS for one, it hands to programs such as Ghostscript. HEIF by pillow-heif.
_FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "AVIF", "HEIF", "BMP", "DIB", "PPM", "JPEG2000", "ICO", "ICNS"),
    *("TGA", "PCX", "DCX", "SGI", "QOI", "PSD", "DDS", "XBM", "XPM"),
)
_HEIC = re.compile(rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", re.DOTALL)
# Where width and height stand in formats of which pillow knows no images without area.
_SIDES = {b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR": (">II", 16), b"GIF8": ("<HH", 6), b"BM": ("<ii", 18)}


def open_image(source: ImageSource) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says, transparent parts on white; the first frame of animations.

    Integers of 16 bits are scaled to 8; floats in arrays and files count from 0 to 1. What overshoots is clipped, up to
    half the range.

    Raises:
        PromptError: the source cannot be found, read or decoded, holds numbers of another range, has no pixels, or more
            than pillow's `Image.MAX_IMAGE_PIXELS` (89 million), which a small file can pretend to hold.
    """
    return open_named(source)[0]


def open_named(source: ImageSource) -> tuple[Image.Image, str]:
    """The image as `open_image` gives it, and what it is called in messages."""
    if isinstance(source, np.ndarray):
        return as_rgb(from_array(source, "The array"), "The array"), "The image"
    if isinstance(source, Image.Image):
        return as_rgb(source, "The image"), "The image"
    if not isinstance(source, str | Path | bytes | bytearray):
        raise PromptError(
            f"An image is of type {type(source).__name__}; expected a path, a URL, the file's bytes, a pillow image or "
            "a numpy array."
        )
    found, name = locate(source, what="image", most_bytes=MOST_BYTES)
    image = decode(found if isinstance(found, bytes) else found.read_bytes(), name)
    if image is None:
        raise PromptError(f"{name} is no image that can be read. Expected a whole PNG, JPEG, WebP, GIF or the like.")
    return as_rgb(image, name), name


def decode(data: bytes, name: str) -> Image.Image | None:
    """The encoded image, its pixels not yet read; None when it is none.

    Raises PromptError when it is too large or has no area.
    """
    try:
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise PromptError(f"{name} is too large ({error}). Make it smaller first.") from error
    except Exception:  # plugins raise whatever a damaged file leads them to
        _check_area(data, name)
        if _HEIC.match(data):
            raise PromptError(
                f"{name} is a HEIC picture, which pillow does not read. Save it as JPEG (sips -s format jpeg a.heic "
                "--out a.jpg), or install and register pillow-heif."
            ) from None
        return None


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An open image of any mode as upright RGB; raises PromptError as `open_image` does.

    A JPEG of more pixels than pillow reads is shrunk by halves while it is decoded.
    """
    most = Image.MAX_IMAGE_PIXELS
    while image.format == "JPEG" and most is not None and image.width * image.height > most:
        before = image.size
        image.draft("RGB", (image.width // 2, image.height // 2))
        if image.size == before:
            break
    check_size(image.width, image.height, name)
    try:
        upright = ImageOps.exif_transpose(image)
        if not upright.mode.startswith(("I", "F")):
            return _rgb(upright)
        numbers = np.asarray(upright)
    except Exception as error:  # plugins raise whatever a damaged file leads them to
        raise PromptError(f"{name} is truncated or damaged ({error}). Save it again or download it anew.") from error
    return from_array(numbers, name).convert("RGB")


def check_size(width: int, height: int, name: str) -> None:
    """Raises PromptError for no pixels, or more than pillow reads."""
    pixels, most = width * height, Image.MAX_IMAGE_PIXELS
    if not pixels:
        raise PromptError(f"{name} is {width} x {height} pixels large, expected at least 1 x 1.")
    if most is not None and pixels > most:
        raise PromptError(
            f"{name} has {pixels:,} pixels, more than {most:,}. Make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS "
            "if you trust it."
        )


def _check_area(data: bytes, name: str) -> None:
    """Raises PromptError when a file that pillow does not know has sides of 0 pixels."""
    for start, (form, place) in _SIDES.items():
        if data.startswith(start) and len(data) >= place + struct.calcsize(form):
            width, height = struct.unpack_from(form, data, place)
            if not width * height:
                check_size(width, height, name)


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode of 8 bits to RGB."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
