"""Pictures to look at."""

import numpy as np
from PIL import Image

from mlx_qwen.config import VisionConfig

VISION = VisionConfig(2, 32, 64, 2, 3, 4, 2, 2, 16, 64)


def drawing(width: int, height: int) -> Image.Image:
    """A gradient with noise on it, so that every patch differs."""
    rng = np.random.default_rng(width * 1000 + height)
    ramp = np.linspace(0, 150, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    return Image.fromarray((ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8))
