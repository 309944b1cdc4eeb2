"""Frames of colours to patches of pixels, as the vision tower reads them, and the settings that say how."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json
from mlx_qwen.media.grids import Grid

MOST_STRETCHED = 200
_MOST = 1 << 40
# No picture is enlarged beyond this area, which takes memory, whatever a config says.
_MOST_LEAST_AREA = 1 << 26
_MOST_CHANNEL = 1e6
# What is done to every picture; 3 is pillow's number of bicubic resampling.
_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255, "resample": 3}


@dataclass(frozen=True, slots=True)
class Patches:
    """Patches fp32 [N, channels · temporal_patch_size · patch_size²] of images or videos, and their grids.

    `name` is what they are called in messages.
    """

    pixel_values: mx.array
    grids: tuple[Grid, ...]
    name: str = "The image"

    @property
    def grid_thw(self) -> mx.array:
        """The grids as an int array [n, 3]."""
        return mx.array(self.grids)


def joined(parts: Sequence[Patches]) -> Patches:
    """One or more groups of patches as one, in their order."""
    values = [part.pixel_values for part in parts]
    names = ", ".join(part.name for part in parts)
    return Patches(mx.concatenate(values), tuple(grid for part in parts for grid in part.grids), names)


@dataclass(frozen=True, slots=True)
class PixelLayout:
    """Sizes of patches, and the `mean` and `std` of each channel that pixels from 0 to 1 are normalised with."""

    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @classmethod
    def from_config(cls, vision: VisionConfig, settings: Mapping[str, Json]) -> "PixelLayout":
        """Sizes of the tower, mean and std of a preprocessor's settings.

        Raises ValueError for what is no number, and for a step that is left out or done otherwise than here.
        """
        sizes = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for name, usual in {**_STEPS, **sizes}.items():
            stated = settings.get(name)
            if stated is not None and not _is_like(stated, usual):
                raise ValueError(f"{name} is {stated!r:.40}, expected {usual!r}")
        return cls(
            patch_size=vision.patch_size,
            temporal_patch_size=vision.temporal_patch_size,
            merge_size=vision.spatial_merge_size,
            mean=_channels(settings.get("image_mean"), cls().mean),
            std=_positive(_channels(settings.get("image_std"), cls().std)),
        )

    @property
    def unit(self) -> int:
        """Pixels along a side of the square that becomes one token."""
        return self.patch_size * self.merge_size

    def patches(self, frames: np.ndarray) -> Patches:
        """Patches of one image or video.

        `frames` is uint8 [T, H, W, C], height and width multiples of `unit`. The last frame is repeated to fill its
        temporal patch. Values of a patch are ordered by channel, time, row and column; those of the patches that merge
        into one token follow each other.
        """
        T, H, W, C = frames.shape
        patch, merge, temporal = self.patch_size, self.merge_size, self.temporal_patch_size
        values = (frames * np.float32(1 / 255) - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        values = np.concatenate([values, np.repeat(values[-1:], -T % temporal, axis=0)])
        grid = Grid(len(values) // temporal, H // patch, W // patch)
        rows, columns = grid.rows // merge, grid.columns // merge
        squares = values.reshape(grid.frames, temporal, rows, merge, patch, columns, merge, patch, C)
        ordered = squares.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(grid.patches, -1)
        return Patches(mx.array(ordered), (grid,))


def check_shape(height: int, width: int, name: str) -> None:
    """Raises PromptError for sides that differ by more than a factor of 200."""
    if max(height, width) > MOST_STRETCHED * min(height, width):
        raise PromptError(
            f"{name} is {width} x {height} pixels, more than {MOST_STRETCHED} times as long as wide. Cut it."
        )


def area_bounds(settings: Mapping[str, Json], default: tuple[int, int]) -> tuple[int, int]:
    """Smallest and largest area of a preprocessor's settings; raises ValueError for what is no number."""
    size = settings.get("size")
    bounds: Mapping[str, Json] = size if isinstance(size, dict) else {}
    low = whole(bounds.get("shortest_edge", settings.get("min_pixels")), default[0], most=_MOST_LEAST_AREA)
    return low, whole(bounds.get("longest_edge", settings.get("max_pixels")), default[1])


def whole(value: Json, default: int, *, most: int = _MOST) -> int:
    """A number from 1 to `most` in a preprocessor's settings, or `default` for null; raises ValueError for others."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= most:
        raise ValueError(f"{value!r:.40} is no number from 1 to {most:,}")
    return int(value)


def _is_like(stated: Json, usual: float) -> bool:
    """Whether a setting says the usual; numbers may be rounded."""
    if not isinstance(stated, int | float) or isinstance(stated, bool) != isinstance(usual, bool):
        return False
    return abs(stated - usual) <= 1e-6 * abs(usual)


def _channels(values: Json, default: tuple[float, ...]) -> tuple[float, ...]:
    if values is None:
        return default
    if not isinstance(values, list) or len(values) != len(default):
        raise ValueError(f"mean or std is {values!r:.100}")
    found = tuple(value for value in values if isinstance(value, int | float) and abs(value) <= _MOST_CHANNEL)
    if len(found) != len(default):
        raise ValueError(f"mean or std is {values!r:.100}, expected {len(default)} numbers")
    return tuple(map(float, found))


def _positive(values: tuple[float, ...]) -> tuple[float, ...]:
    if min(values) <= 0:
        raise ValueError(f"std is {values!r}, expected numbers above 0")
    return values
