"""Images to patches of pixels, as the vision tower reads them: resized by area, normalised, in squares of patches.

Source: transformers' `Qwen2VLImageProcessor`, whose pillow backend gives the same values to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.grids import Grid
from mlx_qwen.prompt.image_sources import ImageSource, open_image
from mlx_qwen.prompt.json_types import Json

MOST_STRETCHED = 200


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches fp32 [N, channels · temporal_patch_size · patch_size²] of images, and the grids they belong to."""

    pixel_values: mx.array
    grids: tuple[Grid, ...]

    @property
    def grid_thw(self) -> mx.array:
        """The grids as an int array [n, 3]."""
        return mx.array(self.grids)


@dataclass(frozen=True, slots=True)
class ImageProcessor:
    """How one checkpoint's images are prepared. `min_pixels` and `max_pixels` bound the area after resizing."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 65536
    max_pixels: int = 16777216
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_config(cls, vision: VisionConfig, settings: Mapping[str, Json]) -> "ImageProcessor":
        """From preprocessor_config.json (`settings`, may be empty); sizes of patches are those of the tower.

        Raises CheckpointError when the settings hold no usable numbers.
        """
        given, size = cls(), settings.get("size")
        bounds: Mapping[str, Json] = size if isinstance(size, dict) else {}
        try:
            return cls(
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                min_pixels=_whole(bounds.get("shortest_edge", settings.get("min_pixels")), given.min_pixels),
                max_pixels=_whole(bounds.get("longest_edge", settings.get("max_pixels")), given.max_pixels),
                mean=_channels(settings.get("image_mean"), given.mean),
                std=_channels(settings.get("image_std"), given.std),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"preprocessor_config.json cannot be used ({error}). Download it again.") from error

    def limited(self, *, min_pixels: int | None = None, max_pixels: int | None = None) -> "ImageProcessor":
        """The same with other bounds where they are given; raises PromptError when no size lies between them."""
        low = self.min_pixels if min_pixels is None else min_pixels
        high = self.max_pixels if max_pixels is None else max_pixels
        if min_pixels is None:
            low = min(low, high)
        if max_pixels is None:
            high = max(low, high)
        if low < 1 or high < low:
            raise PromptError(
                f"min_pixels is {low:,} and max_pixels is {high:,}, expected areas in pixels, the first the smaller."
            )
        return replace(self, min_pixels=low, max_pixels=high)

    def __call__(self, sources: Sequence[ImageSource]) -> Patches:
        """Patches of one or more images, one after the other; raises PromptError as `open_image` does."""
        parts, grids = [], []
        for source in sources:
            image = open_image(source)
            height, width = self.resized(image.height, image.width)
            parts.append(self._patches(image.resize((width, height), Image.Resampling.BICUBIC)))
            grids.append(Grid(1, height // self.patch_size, width // self.patch_size))
        return Patches(mx.array(np.concatenate(parts)), tuple(grids))

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of a merged square, the area within bounds, nearly the same shape.

        Raises PromptError for an image more than 200 times as long as it is wide.
        """
        if max(height, width) > MOST_STRETCHED * min(height, width):
            raise PromptError(
                f"The image is {width} x {height} pixels, more than {MOST_STRETCHED} times as long as wide. Cut it "
                "into pieces."
            )
        unit = self.patch_size * self.merge_size
        new = [round(side / unit) * unit for side in (height, width)]
        if new[0] * new[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
        elif new[0] * new[1] < self.min_pixels:
            stretch = math.sqrt(self.min_pixels / (height * width))
            new = [math.ceil(side * stretch / unit) * unit for side in (height, width)]
        return new[0], new[1]

    def _patches(self, image: Image.Image) -> np.ndarray:
        """fp32 [patches, C · temporal · patch²]: channel, time, row, column; patches of a merged square in a row."""
        patch, merge = self.patch_size, self.merge_size
        colours = np.asarray(image, dtype=np.float32) * np.float32(1 / 255)
        values: np.ndarray = (colours - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        rows, columns = image.height // patch, image.width // patch
        squares = values.reshape(rows // merge, merge, patch, columns // merge, merge, patch, -1)
        ordered = squares.transpose(0, 3, 1, 4, 6, 2, 5).reshape(rows * columns, -1, 1, patch * patch)
        # A still image fills every frame of a temporal patch.
        return np.repeat(ordered, self.temporal_patch_size, axis=2).reshape(rows * columns, -1)


def _whole(value: Json, default: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise ValueError(f"an area is {value!r}")
    return int(value)


def _channels(values: Json, default: tuple[float, ...]) -> tuple[float, ...]:
    if values is None:
        return default
    if not isinstance(values, list) or len(values) != len(default):
        raise ValueError(f"mean or std is {values!r}")
    return tuple(float(value) for value in values if isinstance(value, int | float))
