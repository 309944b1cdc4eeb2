"""Short films to look at."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def film(count: int, width: int, height: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: a gradient that a bright bar moves over, so that every frame differs."""
    rows, columns = np.mgrid[:height, :width]
    still = np.stack([rows * 150 / height, columns * 150 / width, (rows + columns) * 2 % 120], axis=-1)
    frames = np.repeat(still[None], count, axis=0)
    for index in range(count):
        first = index * width // count
        frames[index, :, first : first + max(2, width // 8)] += 100
    return frames.astype(np.uint8)


def animation(frames: np.ndarray, kind: str, *, milliseconds: int | list[int]) -> bytes:
    """The frames as an animated GIF, WebP or PNG; WebP and PNG keep every value."""
    buffer = io.BytesIO()
    images = [Image.fromarray(frame) for frame in frames]
    options = {"lossless": True} if kind == "WEBP" else {}
    images[0].save(buffer, kind, save_all=True, append_images=images[1:], duration=milliseconds, loop=0, **options)
    return buffer.getvalue()


def video_file(path: Path, frames: np.ndarray, *, rate: int, codec: str = "mpeg4") -> Path:
    """The frames encoded by PyAV, as well as the codec can; the test is skipped where PyAV is missing."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
