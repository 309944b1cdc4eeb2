"""Decodes video files through PyAV, which the extra `video` installs."""

import io
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mlx_qwen.errors import PromptError
from mlx_qwen.media.image_sources import check_size
from mlx_qwen.media.taken import Taken

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

_DEFAULT_RATE = 24.0
# Containers often announce a little more than their streams decode to.
_MISSING = 0.05
_MICROSECONDS = 1_000_000
# Containers of pictures, and nothing that leads to other files or hosts, as playlists and session descriptions do.
_FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "ogg"),
    *("nut", "asf", "wmv", "mxf", "rm", "dv", "ivf", "m4v", "h264", "hevc", "obu", "av1", "y4m", "yuv4mpegpipe"),
)
_ALLOWED = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "file"}
# A mean rate that is off by more is not that of the whole.
_OFF_RATE = 0.05


class VideoFile:
    """A file that ffmpeg decodes; `count` and `rate` are what it says of itself, the rate a mean.

    Raises PromptError when it cannot be read, has no pictures, ends long before it says, or PyAV is missing.
    """

    def __init__(self, encoded: Path | bytes, name: str) -> None:
        try:
            import av
        except ImportError as error:
            raise PromptError(
                f"{name} needs a video decoder, which is not installed: pip install 'mlx-qwen[video]'. GIF and WebP "
                "animations and lists of frames need none."
            ) from error
        self.name = name
        self._av = av
        self._encoded = encoded
        try:
            self._look()
        except PromptError:
            raise
        except Exception as error:  # PyAV raises whatever a damaged file leads it to
            raise PromptError(f"{name} is damaged ({_reason(error)}). Save it again or download it anew.") from error
        if not self.count:
            raise PromptError(f"{name} has no frames. Expected a video with at least one picture.")

    def _look(self) -> None:
        """Find out what the file says of itself."""
        with self._open() as container:
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise PromptError(
                    f"{self.name} is in a codec that this build of ffmpeg does not have. Save it as H.264."
                )
            if not stream.width * stream.height:
                raise PromptError(
                    f"{self.name} holds no picture that says how large it is. Save it again or download it anew."
                )
            check_size(stream.width, stream.height, self.name)
            self.rate = float(stream.average_rate or _DEFAULT_RATE)
            self.count = stream.frames
            if not self.count:
                self.count, seconds = self._counted(container)
                # What such files call their mean is that of their first frames.
                if seconds > 0 and abs(self.rate * seconds / self.count - 1) > _OFF_RATE:
                    self.rate = self.count / seconds

    def take(self, indices: Sequence[int]) -> Iterator[Taken]:
        """As `Frames.take`: frames are decoded one after the other, as they build on each other."""
        coming = list(indices)
        taken, decoded, start = None, 0, 0.0
        for decoded, frame in enumerate(self._decoded(), start=1):
            if decoded == 1:
                start = frame.time or 0.0
            if decoded - 1 == coming[0]:
                taken = Taken(_upright(frame), None if frame.time is None else frame.time - start)
                yield taken
                coming.pop(0)
                if not coming:
                    return
        if taken is None or decoded < self.count * (1 - _MISSING) - 1:
            raise PromptError(
                f"{self.name} ends after {decoded:,} of the {self.count:,} frames that it announces. Save it again or "
                "download it anew."
            )
        yield from [taken] * len(coming)

    def _decoded(self) -> Iterator["VideoFrame"]:
        decoded = 0
        with self._open() as container:
            container.streams.video[0].thread_type = "AUTO"
            try:
                for frame in container.decode(video=0):
                    yield frame
                    decoded += 1
            except Exception as error:
                raise PromptError(
                    f"{self.name} is damaged at frame {decoded:,} ({_reason(error)}). Save it or download it again."
                ) from error

    def _open(self) -> "InputContainer":
        file = io.BytesIO(self._encoded) if isinstance(self._encoded, bytes) else f"file:{self._encoded.absolute()}"
        try:
            container = self._av.open(file, "r", options=_ALLOWED)
        except Exception as error:
            raise PromptError(
                f"{self.name} is no video that can be read ({_reason(error)}). Expected MP4, MOV, WebM or the like."
            ) from error
        if not container.streams.video:
            container.close()
            raise PromptError(f"{self.name} has no pictures, only other streams. Expected a video.")
        return container

    def _counted(self, container: "InputContainer") -> tuple[int, float]:
        """Frames of a file that does not say how many it holds, one a packet, and the seconds that they are shown."""
        count, end, shown = 0, 0.0, [inf, -inf]
        try:
            for packet in container.demux():
                is_picture = bool(packet.size) and packet.stream is container.streams.video[0]
                count += is_picture
                if packet.size and packet.pts is not None and packet.time_base is not None:
                    start, last = (
                        float(at * packet.time_base) for at in (packet.pts, packet.pts + (packet.duration or 0))
                    )
                    end = max(end, last)
                    if is_picture:
                        shown = [min(shown[0], start), max(shown[1], last)]
        except Exception as error:
            raise PromptError(
                f"{self.name} is damaged ({_reason(error)}). Save it again or download it anew."
            ) from error
        self._check_end(container, count, end)
        return count, max(shown[1] - shown[0], 0.0)

    def _check_end(self, container: "InputContainer", count: int, end: float) -> None:
        """Raises PromptError when all streams end, at `end` seconds, long before the time that the file announces.

        Times tell it, not the number of frames: at a variable rate there may be far fewer than the rate lets expect.
        """
        announced = (container.duration or 0) / _MICROSECONDS
        # The last frame may be shown for longer than its packet says, and some files give no times at all.
        if count and 0 < end * (1 + 1 / count) < announced * (1 - _MISSING):
            raise PromptError(
                f"{self.name} ends after {end:.1f} of the {announced:.1f} seconds that it announces. Save it again "
                "or download it anew."
            )


def _upright(frame: "VideoFrame") -> Image.Image:
    """The picture, turned as a phone that was held upright asks for."""
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
