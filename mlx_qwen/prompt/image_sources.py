"""Opens images from wherever they come, as upright RGB: files, URLs, bytes, pillow images and arrays."""

import io
import warnings
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from mlx_qwen.errors import PromptError
from mlx_qwen.prompt.sources import locate

# A path, an http(s) or data URL, an encoded file, a pillow image, or pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray

MOST_BYTES = 64 << 20
BROKEN = (OSError, SyntaxError, ValueError, EOFError)


def open_image(source: ImageSource) -> Image.Image:
    """An RGB image, turned as its EXIF orientation says, transparent parts on white; the first frame of animations.

    Integers of 16 bits are scaled to 8; floats in arrays and files count from 0 to 1.

    Raises:
        PromptError: the source cannot be found, read or decoded, has no pixels, or more than pillow's
            `Image.MAX_IMAGE_PIXELS` (89 million), which a small file can pretend to hold.
    """
    if isinstance(source, np.ndarray):
        return as_rgb(_from_array(source), "The array")
    if isinstance(source, Image.Image):
        return as_rgb(source, "The image")
    if not isinstance(source, str | Path | bytes | bytearray):
        raise PromptError(
            f"An image is of type {type(source).__name__}; expected a path, a URL, the file's bytes, a pillow image or "
            "a numpy array."
        )
    found, name = locate(source, what="image", most_bytes=MOST_BYTES)
    image = decode(found if isinstance(found, bytes) else found.read_bytes(), name)
    if image is None:
        raise PromptError(f"{name} is no image that can be read. Expected PNG, JPEG, WebP, GIF or the like.")
    return as_rgb(image, name)


def decode(data: bytes, name: str) -> Image.Image | None:
    """The encoded image, its pixels not yet read; None when it is none. Raises PromptError when it is too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise PromptError(f"{name} is too large ({error}). Make it smaller first.") from error
    except BROKEN:
        return None


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """An open image of any mode as upright RGB; raises PromptError as `open_image` does."""
    check_size(image.width, image.height, name)
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except BROKEN as error:
        raise PromptError(f"{name} is truncated or damaged ({error}). Save it again or download it anew.") from error


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
