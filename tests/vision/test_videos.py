"""Videos from anywhere become the frames, patches and timestamps that transformers makes of them."""

import base64
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.media.video_sources import open_video
from mlx_qwen.media.videos import VideoProcessor
from mlx_qwen.prompt import Processor
from tests.vision.drawing import VISION
from tests.vision.films import animation, film, video_file
from tests.vision.video_reference import Reference

# Values run from -1 to 1, so that this is one of 255 levels: how far pillow's bicubic filter rounds from torch's.
ONE_LEVEL = 2 / 255 + 1e-6
FILMS = {
    "long": (film(40, 64, 48), 10.0),
    "odd": (film(13, 90, 33), 5.0),
    "wide": (film(9, 200, 20), 3.0),
    "tiny": (film(5, 7, 11), 24.0),
    "few": (film(2, 48, 48), 30.0),
    "fractional": (film(31, 50, 70), 29.97),
}


def times(indices: list[int], rate: float) -> list[float]:
    """Frames are paired; the last one stands for a missing partner."""
    filled = [index / rate for index in indices + indices[-1:] * (len(indices) % 2)]
    return [(a + b) / 2 for a, b in zip(filled[::2], filled[1::2], strict=True)]


@pytest.mark.parametrize("area", [(4096, 25165824), (4096, 20000), (40000, 90000)])
@pytest.mark.parametrize("name", FILMS)
def test_frames_patches_and_grids_equal_transformers(name: str, area: tuple[int, int]) -> None:
    frames, rate = FILMS[name]
    reference = Reference(size={"shortest_edge": area[0], "longest_edge": area[1]})
    values, grid, indices = reference(frames, rate)
    processor = VideoProcessor(min_pixels=area[0], max_pixels=area[1])
    found = processor.limited(MediaLimits(source_fps=rate))(frames)
    assert processor.sampled(len(frames), rate) == indices
    assert [list(each) for each in found.grids] == [grid]
    difference = np.abs(np.array(found.pixel_values) - values)
    assert difference.max() <= ONE_LEVEL
    assert (difference > 1e-4).mean() <= 0.01
    assert found.timestamps == pytest.approx(times(indices, rate))
    assert (found.sampled, found.available) == (len(indices), len(frames))


@pytest.mark.parametrize("options", [{"fps": 4.0}, {"max_frames": 6}, {"min_frames": 9}, {"fps": 1, "min_frames": 2}])
def test_the_checkpoints_settings_are_honoured(options: dict[str, float]) -> None:
    frames, rate = FILMS["long"]
    settings = {**options, "size": {"shortest_edge": 64, "longest_edge": 9000}, "image_mean": [0.1, 0.2, 0.3]}
    values, grid, indices = Reference(patch_size=4, **settings)(frames, rate)
    ours = VideoProcessor.from_config(VISION, settings).limited(MediaLimits(source_fps=rate))
    found = ours(frames)
    assert ours.sampled(len(frames), rate) == indices
    assert [list(each) for each in found.grids] == [grid]
    assert np.abs(np.array(found.pixel_values) - values).max() <= ONE_LEVEL


@pytest.mark.parametrize("tokens", [2, 768])
def test_a_cap_on_every_frame_is_that_of_transformers(tokens: int) -> None:
    frames, rate = FILMS["long"]
    settings = {
        "cap_pixels_per_frame": True,
        "max_video_tokens": tokens,
        "size": {"shortest_edge": 64, "longest_edge": 9000},
    }
    _, grid, _ = Reference(patch_size=4, **settings)(frames, rate)
    found = VideoProcessor.from_config(VISION, settings).limited(MediaLimits(source_fps=rate))(frames)  # type: ignore[arg-type]
    assert [list(each) for each in found.grids] == [grid]


def test_unusable_settings_of_a_checkpoint_are_named() -> None:
    for settings in ({"fps": 0}, {"max_frames": "all"}, {"size": {"longest_edge": -1}}):
        with pytest.raises(CheckpointError, match=r"video_preprocessor_config\.json"):
            VideoProcessor.from_config(VISION, settings)  # type: ignore[arg-type]


def test_the_callers_choices_come_before_the_checkpoints() -> None:
    frames, rate = FILMS["long"]
    counts = {}
    for name, limits in {
        "none": MediaLimits(source_fps=rate),
        "fps": MediaLimits(source_fps=rate, fps=5),
        "max_frames": MediaLimits(source_fps=rate, max_frames=2),
        "min_frames": MediaLimits(source_fps=rate, min_frames=20),
    }.items():
        counts[name] = VideoProcessor().limited(limits)(frames).sampled
    assert counts == {"none": 8, "fps": 20, "max_frames": 2, "min_frames": 20}


def test_settings_nested_in_the_processors_come_first(seeing_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(seeing_folder, tmp_path / "nested")
    config = ModelConfig.from_directory(folder)
    size = {"shortest_edge": 128, "longest_edge": 256}
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": {"size": size}, "video_processor": {"size": size, "fps": 3}})
    )
    processor = Processor.from_directory(folder, config)
    images, videos = processor.image_processor, processor.video_processor
    assert images is not None and videos is not None
    assert (images.min_pixels, images.max_pixels) == (videos.min_pixels, videos.max_pixels) == (128, 256)
    assert videos.fps == 3


def test_areas_bound_each_frame_and_all_frames() -> None:
    processor = VideoProcessor()

    def area(**limits: int) -> int:
        height, width = processor.limited(MediaLimits(**limits)).resized(8, 480, 640)
        return height * width

    assert area() == 480 * 640
    assert area(max_pixels=20000) <= 20000
    assert 8 * area(total_pixels=100_000) <= 100_000
    assert area(min_pixels=400_000) >= 400_000
    with pytest.raises(PromptError, match="raise total_pixels"):
        area(min_pixels=400_000, total_pixels=500_000)


def test_a_list_of_frames_counts_as_sampled_already() -> None:
    frames = film(9, 64, 64)
    found = VideoProcessor()(list(frames))
    assert found.sampled == 9
    assert found.timestamps == (0.25, 1.25, 2.25, 3.25, 4.0)
    assert VideoProcessor().limited(MediaLimits(fps=1))(list(frames)).timestamps == (0.5, 2.5, 4.5, 6.5, 8.0)
    assert VideoProcessor().limited(MediaLimits(max_frames=3))(list(frames)).sampled == 3


def test_a_single_frame_is_a_video_too() -> None:
    found = VideoProcessor()([Image.new("RGB", (64, 64), "red")])
    assert [tuple(grid) for grid in found.grids] == [(1, 4, 4)]
    assert found.timestamps == (0.0,)


def test_every_source_gives_the_same_frames(tmp_path: Path) -> None:
    frames = film(6, 40, 24)
    data = animation(frames, "WEBP", milliseconds=500)
    (tmp_path / "a.webp").write_bytes(data)
    pictures = [Image.fromarray(frame) for frame in frames]
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / f"{index}.png")
    sources = [
        frames, pictures, list(frames), [tmp_path / f"{i}.png" for i in range(6)], tmp_path / "a.webp", data,
        str(tmp_path / "a.webp"), f"data:image/webp;base64,{base64.b64encode(data).decode()}",
        animation(frames, "PNG", milliseconds=500),
    ]  # fmt: skip
    for source in sources:
        found = VideoProcessor()(source)  # type: ignore[arg-type]
        opened = np.stack([np.asarray(frame.image) for frame in open_video(source).take(range(6))])  # type: ignore[arg-type]
        assert (opened == frames).all()
        assert found.timestamps == (0.25, 1.25, 2.25)


def test_an_animations_rate_is_the_mean_of_its_frames() -> None:
    video = open_video(animation(film(4, 16, 16), "GIF", milliseconds=[100, 300, 300, 100]))
    assert (video.count, video.rate) == (4, pytest.approx(5.0))


def test_a_lossless_file_gives_its_frames_back(tmp_path: Path) -> None:
    frames = film(12, 48, 32)
    file = video_file(tmp_path / "a.mkv", frames, rate=6, codec="ffv1")
    for source in (file, file.read_bytes()):
        video = open_video(source)
        assert (video.count, video.rate) == (12, 6.0)
        assert [
            np.abs(np.asarray(x.image) - frames[i]).max()
            for x, i in zip(video.take([0, 5, 11]), [0, 5, 11], strict=True)
        ] == [0] * 3


def test_a_file_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    from transformers.video_utils import read_video_pyav

    file = video_file(tmp_path / "a.mp4", film(20, 48, 32), rate=8)
    processor = VideoProcessor()
    video = open_video(file)
    indices = processor.sampled(video.count, video.rate)
    expected, about = read_video_pyav(str(file), lambda metadata: np.array(indices))
    assert (video.count, video.rate) == (about.total_num_frames, about.fps)
    assert (np.stack([np.asarray(frame.image) for frame in video.take(indices)]) == expected).all()


def test_a_film_of_an_upright_phone_stands_upright(tmp_path: Path) -> None:
    frames = film(4, 48, 32)
    data = video_file(tmp_path / "a.mp4", frames, rate=4).read_bytes()
    # The track header's matrix, 44 bytes behind its name: a quarter turn clockwise instead of none.
    place = data.index(b"tkhd") + 44
    turned = (
        data[:place] + struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30) + data[place + 36 :]
    )
    found = np.asarray(next(open_video(turned).take([0])).image)
    assert found.shape == (48, 32, 3)
    assert np.abs(found.astype(int) - np.rot90(frames[0], -1)).mean() < 10


def test_a_file_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom")
    with pytest.raises(PromptError, match=r"pip install 'mlx-qwen\[video\]'"):
        open_video(tmp_path / "a.mp4")


def test_a_damaged_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    data = video_file(tmp_path / "a.mp4", film(20, 64, 48), rate=8).read_bytes()
    with pytest.raises(PromptError, match="no video that can be read"):
        open_video(data[: len(data) // 2])
    middle = data.index(b"mdat") + 200
    with pytest.raises(PromptError, match="damaged at frame"):
        VideoProcessor()(data[:middle] + bytes(2000) + data[middle + 2000 :])


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no_frames": (list, "has no frames"),
    "no_frames_array": (lambda: np.zeros((0, 8, 8, 3), np.uint8), "has no frames"),
    "one_image": (lambda: np.zeros((8, 8, 3), np.uint8), r"expected pixels \[T, H, W"),
    "number": (lambda: 5, "is of type int"),
    "missing": (lambda: "/nowhere/a.mp4", "The video /nowhere/a.mp4 cannot be read"),
    "unequal": (lambda: [Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9))], "Frame 1 of the video is 8 x 9"),
    "thread": (lambda: [Image.new("RGB", (2, 900))] * 2, "200 times"),
    "truncated": (lambda: animation(film(8, 64, 64), "GIF", milliseconds=100)[:3000], "damaged"),
    "unreadable": (lambda: [b"no image"], "no image that can be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_usable_video_is_refused_with_the_reason(case: str) -> None:
    source, message = REFUSED[case]
    with pytest.raises(PromptError, match=message):
        VideoProcessor()(source())  # type: ignore[arg-type]


def test_bytes_that_are_no_video_are_refused() -> None:
    pytest.importorskip("av")
    with pytest.raises(PromptError, match="no video that can be read"):
        open_video(b"hello")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"fps": 0}, "fps is 0; expected frames per second above 0"),
        ({"max_frames": 2.5}, "max_frames is 2.5; expected a whole number"),
        ({"min_frames": 9, "max_frames": 3}, "min_frames is 9 and max_frames is 3"),
        ({"min_pixels": True}, "min_pixels is True"),
    ],
)
def test_limits_that_cannot_be_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        MediaLimits(**limits)
