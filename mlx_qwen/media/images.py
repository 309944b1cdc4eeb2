"""Images to patches of pixels, as the vision tower reads them: resized by area, normalised, in squares of patches.

Source: transformers' `Qwen2VLImageProcessor`, whose pillow backend gives the same values to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import CheckpointError
from mlx_qwen.json_types import Json
from mlx_qwen.media.image_sources import ImageSource, open_named
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.media.patches import Patches, PixelLayout, area_bounds, check_shape, joined


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How one checkpoint's images are prepared. `min_pixels` and `max_pixels` bound the area after resizing."""

    layout: PixelLayout = field(default_factory=PixelLayout)
    min_pixels: int = 65536
    max_pixels: int = 16777216

    @classmethod
    def from_config(cls, vision: VisionConfig, settings: Mapping[str, Json]) -> "ImageProcessor":
        """From preprocessor_config.json (`settings`, may be empty); sizes of patches are those of the tower.

        Raises CheckpointError when the settings hold no usable numbers.
        """
        given = cls()
        try:
            low, high = area_bounds(settings, (given.min_pixels, given.max_pixels))
            return cls(PixelLayout.from_config(vision, settings), low, high)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"preprocessor_config.json cannot be used ({error}). Download it again.") from error

    def limited(self, limits: MediaLimits) -> "ImageProcessor":
        """The same with other bounds where they are chosen; a single one moves the other out of its way."""
        low, high = limits.min_pixels, limits.max_pixels
        return replace(
            self,
            min_pixels=low or min(self.min_pixels, high or self.min_pixels),
            max_pixels=high or max(self.max_pixels, low or self.max_pixels),
        )

    def __call__(self, sources: Sequence[ImageSource]) -> Patches:
        """Patches of one or more images, one after the other; raises PromptError as `open_image` does."""
        parts = []
        for source in sources:
            image, name = open_named(source)
            height, width = self.resized(image.height, image.width, name)
            resized = image.resize((width, height), Image.Resampling.BICUBIC)
            parts.append(replace(self.layout.patches(np.asarray(resized)[None]), name=name))
        return joined(parts)

    def resized(self, height: int, width: int, name: str = "The image") -> tuple[int, int]:
        """Height and width after resizing: multiples of a merged square, the area within bounds, nearly the same shape.

        Raises PromptError, which calls the image `name`, when it is more than 200 times as long as it is wide.
        """
        check_shape(height, width, name)
        unit = self.layout.unit
        new = [round(side / unit) * unit for side in (height, width)]
        if new[0] * new[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
        elif new[0] * new[1] < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            new = [math.ceil(side * stretch / unit) * unit for side in (height, width)]
        return new[0], new[1]
