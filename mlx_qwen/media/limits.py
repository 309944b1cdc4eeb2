"""What a caller may choose about the size of images and videos, and about the frames of a video."""

from dataclasses import dataclass, fields

from mlx_qwen.declared import check_values, documented, option
from mlx_qwen.errors import PromptError

_RATE = "frames per second above 0"


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Bounds of areas in pixels and of frames; None leaves a choice to the checkpoint.

    Raises PromptError for values that cannot be used.

    Attributes:
        {options}
    """

    min_pixels: int | None = option(
        None,
        help="area to which smaller images, and smaller frames of a video, are enlarged. This and the following "
        "choices are the checkpoint's own when left out.",
        least=1,
        flag="--min-pixels",
    )
    max_pixels: int | None = option(
        None, help="area to which larger images and frames are shrunk.", least=1, flag="--max-pixels"
    )
    total_pixels: int | None = option(
        None, help="area that all frames of a video may have together.", least=1, flag="--total-pixels"
    )
    fps: float | None = option(
        None,
        help="frames taken from a second of video; a list of frames counts as taken at this rate already.",
        above=0,
        expected=_RATE,
        flag="--fps",
    )
    min_frames: int | None = option(
        None, help="fewest frames taken from a video that has as many.", least=1, flag="--min-frames"
    )
    max_frames: int | None = option(None, help="most frames taken from a video.", least=1, flag="--max-frames")
    source_fps: float | None = option(
        None,
        help="frames that make a second of a video given as a list of frames; fps of them are taken, not all.",
        above=0,
        expected=_RATE,
    )

    def __post_init__(self) -> None:
        check_values(self)
        for low, high in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and most < least:
                raise PromptError(f"{low} is {least:,} and {high} is {most:,}; expected the first to be the smaller.")

    def over(self, other: "MediaLimits") -> "MediaLimits":
        """These choices, completed by `other`."""
        own = {name: getattr(self, name) for name in NAMES}
        return MediaLimits(**{name: getattr(other, name) if own[name] is None else own[name] for name in NAMES})


NAMES = tuple(field.name for field in fields(MediaLimits))
