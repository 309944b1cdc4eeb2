"""What a caller may choose about the size of images and videos, and about the frames of a video."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

from mlx_qwen.errors import PromptError


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds of areas in pixels and of frames; None leaves a choice to the checkpoint.

    Raises PromptError for values that cannot be used.

    Attributes:
        min_pixels: area to which smaller images, and smaller frames of a video, are enlarged.
        max_pixels: area to which larger images, and larger frames of a video, are shrunk.
        total_pixels: area that all frames of a video may have together.
        fps: frames that are taken from a second of video.
        min_frames: fewest frames that are taken, unless the video has fewer.
        max_frames: most frames that are taken.
        source_fps: frames that make a second of a video given as a list of frames; without it, they count as already
            taken, `fps` of them a second.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    fps: float | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    source_fps: float | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            if value is None:
                continue
            rate = name in ("fps", "source_fps")
            kind = Real if rate else Integral
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value <= 0:
                expected = "frames per second above 0" if rate else "a whole number of at least 1"
                raise PromptError(f"{name} is {value!r}; expected {expected}.")
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and most < least:
                raise PromptError(f"{low} is {least:,} and {high} is {most:,}; expected the first to be the smaller.")

    def over(self, other: "MediaLimits") -> "MediaLimits":
        """These choices, completed by `other`."""
        own = {name: getattr(self, name) for name in NAMES}
        return MediaLimits(**{name: getattr(other, name) if own[name] is None else own[name] for name in NAMES})


NAMES = tuple(field.name for field in fields(MediaLimits))
