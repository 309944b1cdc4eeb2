"""Numbers of any type as the colours of an image, 8 bits each."""

import numpy as np
from PIL import Image

from mlx_qwen.errors import PromptError

# Sharpening and bicubic filters overshoot by less than half the range; pixels made for another scale reach further.
_OVERSHOOT = 0.5


def from_array(pixels: np.ndarray, name: str) -> Image.Image:
    """An image of pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; raises PromptError as `to_8_bits` does, and for
    other shapes.
    """
    shape = pixels.shape
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in (1, 3, 4)) or 0 in shape:
        raise PromptError(
            f"{name} has shape {list(shape)}, expected pixels [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], channels "
            "last and at least 1 x 1."
        )
    return Image.fromarray(to_8_bits(pixels.squeeze(2) if shape[2:] == (1,) else pixels, name))


def to_8_bits(pixels: np.ndarray, name: str) -> np.ndarray:
    """uint8 values of the same shape: booleans and floats from 0 to 1, wider integers as 16 bits when they exceed 8.

    What lies outside is clipped. Raises PromptError for values more than half the range outside, and for what is
    neither boolean, integer nor float.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind not in "buif":
        raise PromptError(f"{name} holds values of type {pixels.dtype}; expected integers, floats or booleans.")
    values = np.nan_to_num(pixels.astype(np.float64), copy=False, posinf=np.inf, neginf=-np.inf)
    white = _white(pixels.dtype, values)
    low, high = values.min(), values.max()
    if low < -_OVERSHOOT * white or high > (1 + _OVERSHOOT) * white:
        found = f"up to {high:,g}" if high > white else f"down to {low:,g}"
        raise PromptError(
            f"{name} holds values {found}: floats count from 0 to 1, integers from 0 to 255 or to 65,535. Scale them "
            "first."
        )
    return (values / white * 255).clip(0, 255).round().astype(np.uint8)


def _white(dtype: np.dtype, values: np.ndarray) -> float:
    """The value of full brightness."""
    if dtype.kind in "bf":
        return 1.0
    return 65535.0 if (dtype.kind, dtype.itemsize) == ("u", 2) or values.max() > 255 else 255.0
