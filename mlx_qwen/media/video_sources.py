"""Opens videos from wherever they come: files and URLs, GIF, WebP and PNG animations, lists of frames and arrays."""

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
from PIL import Image

from mlx_qwen.errors import PromptError
from mlx_qwen.media.image_sources import ImageSource, as_rgb, check_size, decode, open_image
from mlx_qwen.media.sources import locate
from mlx_qwen.media.taken import Taken

# A path, an http(s) or data URL, an encoded file, frames (images of one size), or pixels [T, H, W, 1, 3 or 4].
VideoSource: TypeAlias = str | Path | bytes | Sequence[ImageSource] | np.ndarray

MOST_BYTES = 1 << 30
_FRAME_SECONDS = 0.1
# Every frame builds on those before it: more would take minutes to find out how long each is shown.
_MOST_PIXELS = 1 << 32
# AVI begins with RIFF too, and says what it is behind its length.
_SIGNATURE = re.compile(rb"GIF8|\x89PNG|RIFF....WEBP", re.DOTALL)


class Frames(Protocol):
    """An open video: `count` frames, `rate` of them a second, or None where only the caller can know."""

    @property
    def name(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def rate(self) -> float | None: ...

    def take(self, indices: Sequence[int]) -> Iterator[Taken]:
        """The frames of growing indices; raises PromptError for one that cannot be read."""


def open_video(source: VideoSource) -> Frames:
    """A video whose frames can be taken.

    Raises:
        PromptError: the source cannot be found or decoded, or holds no frames, or it is an encoded video and the
            package `av` is not installed.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise PromptError(
                f"The video has shape {list(source.shape)}, expected pixels [T, H, W, 1, 3 or 4], channels last."
            )
        return FrameList(list(source))
    if isinstance(source, str | Path | bytes | bytearray):
        return _open_encoded(source)
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return FrameList(source)
    raise PromptError(
        f"A video is of type {type(source).__name__}; expected a path, a URL, the file's bytes, a list of images or an "
        "array [T, H, W, 3]."
    )


class FrameList:
    """Frames that the caller holds."""

    name = "The video"
    rate = None

    def __init__(self, frames: Sequence[ImageSource]) -> None:
        if not len(frames):
            raise PromptError("The video has no frames; expected at least one image.")
        self._frames = frames
        self.count = len(frames)

    def take(self, indices: Sequence[int]) -> Iterator[Taken]:
        """As `Frames.take`; frames of another size than the first are refused."""
        first = None
        for index in indices:
            frame = open_image(self._frames[index])
            first = first or frame.size
            if frame.size != first:
                raise PromptError(
                    f"Frame {index} of the video is {frame.width} x {frame.height} pixels, the first {first[0]} x "
                    f"{first[1]}. Bring all frames to one size."
                )
            yield Taken(frame, None)


class Animation:
    """An animated GIF, WebP or PNG; its rate is the mean over all frames. A still image is a video of one frame."""

    def __init__(self, image: Image.Image, name: str) -> None:
        check_size(image.width, image.height, name)
        self.name = name
        self._image = image
        self.count = self._counted()
        if self.count > 1 and self.count * image.width * image.height > _MOST_PIXELS:
            raise PromptError(
                f"{name} has {self.count:,} frames of {image.width} x {image.height} pixels, more than an animation "
                "may have. Save it as a video file, or pass some of its frames as a list."
            )
        durations = (self._duration(index) for index in range(self.count))
        self._starts = list(accumulate(durations, initial=0.0))
        self.rate = self.count / self._starts[-1]

    def _counted(self) -> int:
        """Frames of the file; pillow reads all of it to know."""
        try:
            return int(getattr(self._image, "n_frames", 1))
        except Exception as error:  # plugins raise whatever a damaged file leads them to
            raise PromptError(f"{self.name} is damaged ({error}). Save it again or download it anew.") from error

    def _duration(self, index: int) -> float:
        """Seconds that a frame is shown; as in browsers, 0.1 where the file says nothing."""
        try:
            self._image.seek(index)
            self._image.load()
        except Exception as error:  # as above
            raise PromptError(f"{self.name} is damaged at frame {index} ({error}). Save it again.") from error
        shown = self._image.info.get("duration")
        return (float(shown) / 1000 if isinstance(shown, int | float) and shown > 0 else 0.0) or _FRAME_SECONDS

    def take(self, indices: Sequence[int]) -> Iterator[Taken]:
        """As `Frames.take`."""
        for index in indices:
            self._image.seek(index)
            yield Taken(as_rgb(self._image.copy(), self.name), self._starts[index])


def _open_encoded(source: str | Path | bytes) -> Frames:
    found, name = locate(source, what="video", most_bytes=MOST_BYTES)
    if isinstance(found, bytes):
        start = found[:12]
    else:
        with found.open("rb") as file:
            start = file.read(12)
    if _SIGNATURE.match(start):
        image = decode(found if isinstance(found, bytes) else found.read_bytes(), name)
        if image is None:
            raise PromptError(
                f"{name} begins as a GIF, WebP or PNG does, but holds no frame that can be read. Save it again or "
                "download it anew."
            )
        return Animation(image, name)
    # Most prompts hold no videos, and their decoder is an extra.
    from mlx_qwen.media.video_files import VideoFile

    return VideoFile(found, name)
