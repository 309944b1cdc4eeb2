"""Videos to patches of pixels: which frames are taken, how large they become, and at what times they stand.

Source: transformers' `Qwen3VLVideoProcessor` and `Qwen3VLProcessor`. Frames are resized by pillow, whose bicubic filter
differs from the reference's by rounding: by at most one of 255 levels.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.json_types import Json
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.media.patches import Patches, PixelLayout, area_bounds, check_shape, whole
from mlx_qwen.media.video_sources import Frames, VideoSource, open_video

_LEAST, _MOST = 4096, 25165824
_FRAME_TOKENS = 768
_MOST_FPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoPatches(Patches):
    """Patches of one video.

    Attributes:
        timestamps: seconds of each temporal patch, the mean of its first and last frame.
        sampled: frames that were taken.
        available: frames that there were.
    """

    timestamps: tuple[float, ...]
    sampled: int
    available: int


@dataclass(frozen=True, slots=True)
class VideoProcessor:
    """How one checkpoint's videos are prepared.

    `min_pixels` and `max_pixels` bound the area of all frames together after resizing, `frame_pixels` that of each
    frame. `fps` frames are taken from a second, at least `min_frames` and at most `max_frames`.
    """

    layout: PixelLayout = field(default_factory=PixelLayout)
    min_pixels: int = _LEAST
    max_pixels: int = _MOST
    frame_pixels: int | None = None
    least_frame_pixels: int = 0
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    source_fps: float | None = None

    @classmethod
    def from_config(cls, vision: VisionConfig, settings: Mapping[str, Json]) -> "VideoProcessor":
        """From video_preprocessor_config.json (`settings`, may be empty); sizes of patches are those of the tower.

        Raises CheckpointError when the settings hold no usable numbers.
        """
        given = cls()
        try:
            layout = PixelLayout.from_config(vision, settings)
            low, high = area_bounds(settings, (given.min_pixels, given.max_pixels))
            tokens = whole(settings.get("max_video_tokens"), _FRAME_TOKENS)
            rate = settings.get("fps")
            if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float)):
                raise ValueError(f"fps is {rate!r:.40}")
            if rate is not None and not 0 < rate <= _MOST_FPS:
                raise ValueError(f"fps is {rate!r:.40}, expected a number above 0 and at most {_MOST_FPS:,}")
            return cls(
                layout,
                min_pixels=low,
                max_pixels=high,
                frame_pixels=tokens * layout.unit**2 if settings.get("cap_pixels_per_frame") is True else None,
                fps=given.fps if rate is None else float(rate),
                min_frames=whole(settings.get("min_frames"), given.min_frames),
                max_frames=whole(settings.get("max_frames"), given.max_frames),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"video_preprocessor_config.json cannot be used ({error}). Download it again."
            ) from error

    def limited(self, limits: MediaLimits) -> "VideoProcessor":
        """The same with other bounds where they are chosen; a single one moves the other out of its way."""
        least, most = limits.min_frames, limits.max_frames
        return replace(
            self,
            max_pixels=limits.total_pixels or self.max_pixels,
            frame_pixels=limits.max_pixels or self.frame_pixels,
            least_frame_pixels=limits.min_pixels or self.least_frame_pixels,
            fps=limits.fps or self.fps,
            min_frames=least or min(self.min_frames, most or self.min_frames),
            max_frames=most or max(self.max_frames, least or self.max_frames),
            source_fps=limits.source_fps or self.source_fps,
        )

    def __call__(self, source: VideoSource) -> VideoPatches:
        """Patches of one video; raises PromptError as `open_video` does."""
        video = open_video(source)
        rate = video.rate or self.source_fps
        indices = self.sampled(video.count, rate)
        frames, shown = self._resized_frames(video, indices)
        patches = self.layout.patches(frames)
        times = _times(indices, shown, rate or self.fps)
        return VideoPatches(
            patches.pixel_values,
            patches.grids,
            timestamps=self._timestamps(times),
            sampled=len(indices),
            available=video.count,
            name=video.name,
        )

    def sampled(self, count: int, rate: float | None) -> list[int]:
        """Which of `count` frames are taken, evenly: `fps` a second of a video with `rate` frames a second, or all of
        those that come at `fps` already (`rate` None), within the bounds.
        """
        wanted = count if rate is None else int(count / rate * self.fps)
        wanted = min(max(wanted, self.min_frames), self.max_frames, count)
        indices: list[int] = np.linspace(0, count - 1, wanted).round().astype(int).tolist()
        return indices

    def resized(self, frames: int, height: int, width: int, name: str = "The video") -> tuple[int, int]:
        """Height and width of each of `frames` frames after resizing: multiples of a merged square, the area of all
        frames within bounds, nearly the same shape.

        Raises PromptError, which calls the video `name`, for frames more than 200 times as long as they are wide.
        """
        unit, temporal = self.layout.unit, self.layout.temporal_patch_size
        frames = max(frames, temporal)
        low, high = self._bounds(frames)
        if min(height, width) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        check_shape(height, width, name)
        counted = round(frames / temporal) * temporal
        new = [round(side / unit) * unit for side in (height, width)]
        if counted * new[0] * new[1] > high:
            shrink = math.sqrt(frames * height * width / high)
            new = [max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width)]
        elif counted * new[0] * new[1] < low:
            stretch = math.sqrt(low / (frames * height * width))
            new = [math.ceil(side * stretch / unit) * unit for side in (height, width)]
        return new[0], new[1]

    def _bounds(self, frames: int) -> tuple[int, int]:
        """Smallest and largest area of all frames together."""
        low = max(self.min_pixels, self.least_frame_pixels * frames)
        high = self.max_pixels
        if self.frame_pixels is not None:
            high = max(min(self.frame_pixels, high // frames), int(self.min_pixels * 1.05)) * frames
        if self.least_frame_pixels * frames > high:
            raise PromptError(
                f"{frames} frames of at least {self.least_frame_pixels:,} pixels need more than the {high:,} pixels "
                "that a video may have. Lower min_pixels or max_frames, or raise total_pixels."
            )
        return min(low, high), high

    def _resized_frames(self, video: Frames, indices: list[int]) -> tuple[np.ndarray, list[float | None]]:
        """uint8 [T, H, W, 3], and the seconds at which each frame is shown, where the video says so.

        Each frame is resized as it comes, so that the large ones are never all in memory.
        """
        frames: list[np.ndarray] = []
        shown: list[float | None] = []
        size: tuple[int, int] | None = None
        for image, seconds in video.take(indices):
            if size is None:
                height, width = self.resized(len(indices), image.height, image.width, video.name)
                size = width, height
            # Width first, as torch does: values are rounded and clipped in between, which shows at hard edges.
            wide = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
            frames.append(np.asarray(wide.resize(size, Image.Resampling.BICUBIC)))
            shown.append(seconds)
        return np.stack(frames), shown

    def _timestamps(self, times: list[float]) -> tuple[float, ...]:
        temporal = self.layout.temporal_patch_size
        filled = times + times[-1:] * (-len(times) % temporal)
        return tuple((filled[i] + filled[i + temporal - 1]) / 2 for i in range(0, len(filled), temporal))


def _times(indices: list[int], shown: list[float | None], rate: float) -> list[float]:
    """Seconds of frames: as the rate says, or each frame's own where some are off that by half a frame or more.

    Files of a constant rate keep the reference's times, to which those in a container are rounded.
    """
    even = [index / rate for index in indices]
    own = [time if seconds is None else seconds for time, seconds in zip(even, shown, strict=True)]
    return own if any(abs(a - b) >= 0.5 / rate for a, b in zip(even, own, strict=True)) else even
