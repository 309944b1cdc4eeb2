"""Video files that hold no frames, or fewer than they say, are refused with the reason."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen.errors import PromptError
from mlx_qwen.media.video_sources import open_video
from mlx_qwen.media.videos import VideoProcessor
from tests.vision.films import animation, film, video_file

FILM = film(40, 64, 48)


def silent_film(path: Path, *, frames: int | None, blocks: int) -> Path:
    """A file with `frames` frames in its stream of pictures (None: no such stream) and `blocks` blocks of silence."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        pictures = None if frames is None else file.add_stream("mpeg4", rate=10, width=64, height=48)
        silence = file.add_stream("aac", rate=44100, layout="mono")
        for frame in FILM[: frames or 0]:
            file.mux(pictures.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for index in range(blocks):
            block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            block.sample_rate, block.pts = 44100, 1024 * index
            file.mux(silence.encode(block))
        for stream in (pictures if frames else None, silence):
            file.mux(stream.encode() if stream else [])
    return path


def uneven_film(path: Path, milliseconds: list[int]) -> Path:
    """A film whose frames come at the times that are given."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10, width=64, height=48, time_base=Fraction(1, 1000))
        for time, pixels in zip(milliseconds, FILM, strict=False):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cut(file: Path, share: float) -> bytes:
    """The start of a file."""
    data = file.read_bytes()
    return data[: int(share * len(data))]


def quick_start(folder: Path, *, frames: int = 40, codec: str = "mpeg4") -> Path:
    """An MP4 whose index stands in front of its frames, as on the web."""
    av = pytest.importorskip("av")
    path = folder / "quick.mp4"
    with (
        av.open(str(video_file(folder / "a.mp4", FILM[:frames], rate=10, codec=codec))) as slow,
        av.open(str(path), "w", options={"movflags": "faststart"}) as quick,
    ):
        stream = quick.add_stream_from_template(slow.streams.video[0])
        for packet in slow.demux(video=0):
            if packet.size:
                packet.stream = stream
                quick.mux(packet)
    return path


def without_frames(file: Path) -> bytes:
    """An MP4 up to where its frames begin."""
    return b"".join(file.read_bytes().partition(b"mdat")[:2])


UNUSABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pictures_without_packets": (
        lambda folder: silent_film(folder / "a.mkv", frames=0, blocks=10),
        r"a\.mkv has no frames\. Expected a video with at least one picture",
    ),
    "sound_alone": (
        lambda folder: silent_film(folder / "a.mp4", frames=None, blocks=10),
        r"a\.mp4 has no pictures, only other streams",
    ),
    "index_in_front_and_cut": (
        lambda folder: cut(quick_start(folder), 0.5),
        r"bytes ends after \d+ of the 40 frames that it announces",
    ),
    "index_alone": (
        lambda folder: without_frames(quick_start(folder)),
        "bytes holds no picture that says how large it is",
    ),
    "index_of_one_frame_alone": (
        lambda folder: without_frames(quick_start(folder, frames=1, codec="libx264")),
        "bytes ends after 0 of the 1 frames that it announces",
    ),
    "index_behind_and_cut": (
        lambda folder: cut(video_file(folder / "a.mp4", FILM, rate=10), 0.5),
        "bytes is no video that can be read",
    ),
    "webm_cut": (
        lambda folder: cut(video_file(folder / "a.webm", FILM, rate=10, codec="libvpx"), 0.5),
        r"bytes ends after 1\.\d of the 4\.0 seconds that it announces",
    ),
    "uneven_and_cut": (
        lambda folder: cut(uneven_film(folder / "a.mkv", [*range(0, 800, 40), *range(1000, 20000, 1000)]), 0.5),
        r"bytes ends after \d\.\d of the 19\.\d seconds",
    ),
    "spoiled_end": (
        lambda folder: video_file(folder / "a.nut", FILM, rate=10).read_bytes()[:-16] + b"\xff" * 50,
        r"bytes is damaged \(Invalid data",
    ),
    "webp_cut": (lambda _: animation(FILM[:8], "WEBP", milliseconds=100)[:900], "begins as a GIF, WebP or PNG does"),
    "gif_without_frames": (lambda _: b"GIF89a\x20\x00\x20\x00\x00\x00\x00;", "holds no frame that can be read"),
    "gif_without_area": (lambda _: b"GIF89a\x00\x00\x00\x00\x00\x00\x00;", "is 0 x 0 pixels large"),
    "empty_text": (lambda _: "", "The video is an empty text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_without_the_frames_it_should_hold_is_refused(case: str, tmp_path: Path) -> None:
    build, message = UNUSABLE[case]
    with pytest.raises(PromptError, match=message):
        VideoProcessor()(build(tmp_path))  # type: ignore[arg-type]


def test_a_whole_file_that_does_not_count_its_frames_is_read(tmp_path: Path) -> None:
    for file in (
        video_file(tmp_path / "a.mkv", FILM, rate=10),
        uneven_film(tmp_path / "uneven.mkv", [*range(0, 800, 40), *range(1000, 21000, 1000)]),
        uneven_film(tmp_path / "late.mkv", [*range(5000, 9000, 100)]),
        silent_film(tmp_path / "sound_goes_on.mkv", frames=40, blocks=900),
        video_file(tmp_path / "a.ts", FILM, rate=10, codec="mpeg2video"),
    ):
        assert open_video(file).count == 40


@pytest.mark.parametrize("container", ["mkv", "mp4"])
def test_frames_at_uneven_times_stand_at_their_own(container: str, tmp_path: Path) -> None:
    milliseconds = [*range(3000, 3800, 100), *range(4000, 24000, 1000)]
    file = uneven_film(tmp_path / f"uneven.{container}", milliseconds)
    found = VideoProcessor(min_frames=28)(file)
    seconds = [(time - milliseconds[0]) / 1000 for time in milliseconds]
    assert found.sampled == 28
    assert found.timestamps == pytest.approx([sum(seconds[i : i + 2]) / 2 for i in range(0, 28, 2)], abs=0.002)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_frames_of_an_uneven_animation_stand_at_their_own_times(kind: str) -> None:
    data = animation(FILM[:6], kind, milliseconds=[100, 100, 1000, 2000, 100, 700])
    found = VideoProcessor(min_frames=6)(data)
    assert found.timestamps == pytest.approx([0.05, (0.2 + 1.2) / 2, (3.2 + 3.3) / 2])


def test_a_matroska_file_that_slows_down_is_sampled_by_its_real_rate(tmp_path: Path) -> None:
    file = uneven_film(tmp_path / "slow.mkv", [*range(0, 400, 100), *range(1000, 37000, 1000)])
    assert open_video(file).rate == pytest.approx(40 / 36.1, rel=0.03)


TEXTS = {
    "words": "words\n" * 200,
    "playlist": "#EXTM3U\n#EXTINF:1,\nother.mp4\n",
    "session": "v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "concat": "ffconcat version 1.0\nfile other.mp4\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("suffix", [".txt", ".mp4", ".m3u8", ".sdp"])
def test_a_text_is_no_video_whatever_it_is_called(text: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_text(text)
    video_file(tmp_path / "other.mp4", FILM[:4], rate=10)
    for source in (file, file.read_bytes()):
        with pytest.raises(PromptError, match=r"is no video that can be read.*Expected MP4, MOV, WebM"):
            open_video(source)


def test_a_name_that_reads_as_a_protocol_is_a_files_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video_file(tmp_path / "a.mp4", FILM[:4], rate=10).rename(tmp_path / "concat:a|b.mp4")
    monkeypatch.chdir(tmp_path)
    assert open_video("concat:a|b.mp4").count == 4


def test_the_last_frame_may_last_longer_than_its_packet_says(tmp_path: Path) -> None:
    assert open_video(video_file(tmp_path / "a.flv", FILM[:5], rate=10, codec="flv")).count == 5


def test_frames_larger_than_pillow_reads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = video_file(tmp_path / "a.mp4", FILM[:2], rate=10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(PromptError, match=r"a\.mp4 has 3,072 pixels, more than 3,000"):
        open_video(file)


def test_frames_as_thin_as_a_thread_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64 * 201)).save(tmp_path / "thin.gif")
    with pytest.raises(PromptError, match=r"thin\.gif is 64 x 12864 pixels, more than 200 times"):
        VideoProcessor()(tmp_path / "thin.gif")


def test_an_avi_is_no_animation_though_both_are_riff(tmp_path: Path) -> None:
    assert open_video(video_file(tmp_path / "a.avi", FILM, rate=10)).count == 40
