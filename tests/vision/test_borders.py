"""Pictures and videos from strangers: nothing hangs, fills memory, leads elsewhere or shows a traceback."""

import base64
import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen.config import VisionConfig
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.media import image_sources, video_sources, web
from mlx_qwen.media.image_sources import open_image
from mlx_qwen.media.images import ImageProcessor
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.media.video_sources import open_video
from mlx_qwen.media.videos import VideoProcessor
from tests.vision.drawing import drawing
from tests.vision.films import animation, film, video_file

VISION = VisionConfig(2, 32, 64, 2, 3, 16, 2, 2, 64, 64)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    drawing(20, 30).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def served() -> Iterator[Callable[[bytes, float], str]]:
    """`served(answer, pause)`: the address of a server that sends these bytes one by one, `pause` seconds between."""
    sockets: list[socket.socket] = []

    def serve(answer: bytes, pause: float = 0.0) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        sockets.append(listening)

        def answer_all() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                with client:
                    client.recv(4096)
                    try:
                        for byte in [answer] if not pause else (bytes([byte]) for byte in answer):
                            client.sendall(byte)
                            time.sleep(pause)
                    except OSError:
                        continue

        threading.Thread(target=answer_all, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/a.png"

    yield serve
    for listening in sockets:
        listening.close()


OK = b"HTTP/1.1 200 OK\r\n"
ANSWERS = {
    "no_status": b"hello\r\n\r\n",
    "odd_status": b"HTTP/1.1 abc\r\n\r\n",
    "nothing": b"",
    "incomplete": OK + b"Content-Length: 5000\r\n\r\nabc",
    "long_header": OK + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "many_headers": OK + b"".join(b"X-%d: a\r\n" % i for i in range(1000)) + b"\r\n",
    "bad_chunks": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "moved_nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
    "moved_to_a_file": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    "moved_to_ftp": b"HTTP/1.1 302 Found\r\nLocation: ftp://127.0.0.1/a\r\n\r\n",
}


@pytest.mark.parametrize("case", ANSWERS)
def test_whatever_a_server_answers_is_one_error(
    case: str, served: Callable[[bytes, float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(web.PRIVATE_ALLOWED, "1")
    with pytest.raises(PromptError, match=r"cannot be downloaded|no image that can be read"):
        open_image(served(ANSWERS[case], 0.0))


@pytest.mark.parametrize("head", [OK + b"Content-Length: 100\r\n\r\n", b""], ids=["body", "header"])
def test_a_server_that_sends_drop_by_drop_is_left(
    head: bytes, served: Callable[[bytes, float], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(web.PRIVATE_ALLOWED, "1")
    monkeypatch.setattr(web, "_TOTAL_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(PromptError, match=r"not there after 0\.5 seconds"):
        open_image(served(head + OK * 100, 0.05))
    assert time.monotonic() - started < 10


def test_more_than_may_come_is_left(served: Callable[[bytes, float], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(web.PRIVATE_ALLOWED, "1")
    monkeypatch.setattr(image_sources, "MOST_BYTES", 1000)
    with pytest.raises(PromptError, match="larger than"):
        open_image(served(OK + b"\r\n" + b"a" * 100_000, 0.0))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]", "2130706433", "127.1"])
def test_this_machine_is_asked_only_where_that_is_allowed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(web.PRIVATE_ALLOWED, raising=False)
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encoded("PNG"))

        def log_message(self, format: str, *args: object) -> None: ...

    family = socket.AF_INET6 if host == "[::1]" else socket.AF_INET
    server_class = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    try:
        server = server_class(("::1" if family is socket.AF_INET6 else "127.0.0.1", 0), Handler)
    except OSError:
        pytest.skip("this machine has no such address")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://{host}:{server.server_address[1]}/a.png"
    with pytest.raises(PromptError, match=r"private network.*MLX_QWEN_PRIVATE_URLS=1|cannot be downloaded"):
        open_image(url)
    assert asked == []
    monkeypatch.setenv(web.PRIVATE_ALLOWED, "1")
    assert open_image(url).size == (20, 30)
    server.shutdown()


@pytest.mark.parametrize(
    "private", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"]
)
def test_a_private_address_is_one_in_every_dress(private: str) -> None:
    number = int(IPv4Address(private))
    dresses = [
        private,
        f"::ffff:{private}",
        str(IPv6Address(0x64FF9B << 96 | number)),
        str(IPv6Address(0x2002 << 112 | number << 80)),
    ]
    assert [dress for dress in dresses if web.is_public(dress)] == []
    assert not any(map(web.is_public, ("::1", "::", "fe80::1", "fd00::1", "224.0.0.1", "ff02::1", "255.255.255.255")))


@pytest.mark.parametrize("address", ["1.1.1.1", "::ffff:1.1.1.1", "64:ff9b::101:101", "2606:4700::1111"])
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert web.is_public(address)


@pytest.mark.parametrize("url", ["http://", "http://[", "https://a b/", "http://a\nb/", "http://:99999/", "http://%zz"])
def test_addresses_that_are_none_are_one_error(url: str) -> None:
    with pytest.raises(PromptError, match="cannot be downloaded"):
        open_image(url)


@pytest.mark.parametrize("open_media", [open_image, open_video], ids=["image", "video"])
def test_devices_pipes_and_folders_are_no_files(open_media: Callable[[str], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(PromptError, match="cannot be read"):
            open_media(path)


def test_a_data_url_has_a_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "MOST_BYTES", 10_000)
    small = f"data:image/png;base64,{base64.b64encode(encoded('PNG')).decode()}"
    assert open_image(small).size == (20, 30)
    with pytest.raises(PromptError, match="data URL is larger than"):
        open_image(f"data:image/png;base64,{'A' * 20_000}")


def test_no_picture_is_handed_to_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 30\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(PromptError, match="no image that can be read"):
        open_image(eps)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "PPM", "ICO", "TGA"])
def test_the_usual_formats_are_read(kind: str) -> None:
    assert open_image(encoded(kind)).width > 0


def test_a_heic_picture_is_named() -> None:
    with pytest.raises(PromptError, match=r"HEIC picture.*sips -s format jpeg"):
        open_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))


def test_an_animation_without_end_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = animation(film(30, 40, 40), "GIF", milliseconds=10)
    assert open_video(data).count == 30
    monkeypatch.setattr(video_sources, "_MOST_PIXELS", 20_000)
    with pytest.raises(PromptError, match="30 frames of 40 x 40 pixels"):
        open_video(data)


def test_a_film_in_a_codec_that_is_missing_is_one_error(tmp_path: Path) -> None:
    data = video_file(tmp_path / "a.mov", film(5, 32, 32), rate=10, codec="libx264").read_bytes()
    with pytest.raises(PromptError, match="codec that this build of ffmpeg does not have"):
        VideoProcessor()(data.replace(b"avc1", b"zzzz"))


NAN, INFINITE = float("nan"), float("inf")
ODD_SETTINGS: list[dict[str, object]] = [
    {"size": {"shortest_edge": 10**12}},
    {"size": {"longest_edge": INFINITE}},
    {"size": {"shortest_edge": NAN}},
    {"size": {"shortest_edge": 10**400}},
    {"image_mean": ["a", "b", "c"]},
    {"image_mean": [NAN, 0.5, 0.5]},
    {"image_std": [0, 0.5, 0.5]},
    {"image_mean": 5},
]


@pytest.mark.parametrize("settings", ODD_SETTINGS, ids=range(len(ODD_SETTINGS)))
def test_settings_that_no_picture_can_have_are_refused(settings: dict[str, object]) -> None:
    for processor in (ImageProcessor, VideoProcessor):
        with pytest.raises(CheckpointError, match="cannot be used"):
            processor.from_config(VISION, settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("fps", [NAN, INFINITE, 10**400, -1, 0, "2"], ids=range(6))
def test_a_rate_that_is_none_is_refused(fps: object) -> None:
    with pytest.raises(CheckpointError, match="fps is"):
        VideoProcessor.from_config(VISION, {"fps": fps})  # type: ignore[dict-item]
    with pytest.raises(PromptError, match="fps is"):
        MediaLimits(fps=fps)  # type: ignore[arg-type]


def test_a_picture_of_one_pixel_is_still_one() -> None:
    assert open_image(Image.new("RGB", (1, 1))).size == (1, 1)


def test_a_photo_of_too_many_pixels_is_shrunk_while_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    drawing(128, 96).save(buffer, "JPEG", quality=95)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 96 - 1)
    found = open_image(buffer.getvalue())
    assert found.size == (64, 48)
    expected = drawing(128, 96).resize((64, 48), Image.Resampling.BOX)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 6
    with pytest.raises(PromptError, match="more than 12,287"):
        open_image(drawing(128, 96))
