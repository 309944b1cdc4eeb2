"""Images and videos of a request: data URLs are shown as they are, within limits, and nothing else is opened."""

import base64
import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from PIL import Image

from mlx_qwen.media.grids import Kind
from mlx_qwen.prompt.media_parts import Media
from tests.server.running import ScriptedBackend, running, words
from tests.vision.films import animation, film

CHAT, RESPONSE, MESSAGE = "/v1/chat/completions", "/v1/responses", "/v1/messages"
IMAGES = [
    (CHAT, {"type": "image_url", "image_url": {"url": "{}"}}),
    (MESSAGE, {"type": "image", "source": {"type": "url", "url": "{}"}}),
    (RESPONSE, {"type": "input_image", "image_url": "{}"}),
]
VIDEOS = [
    (CHAT, {"type": "video_url", "video_url": {"url": "{}"}}),
    (RESPONSE, {"type": "input_video", "video_url": "{}"}),
]


def png(width=8, height=8):
    data = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(data, "PNG")
    return data.getvalue()


def data_url(data, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def showing(path, part, *urls):
    """A request that shows what is at some addresses."""
    parts = [json.loads(json.dumps(part).replace("{}", url)) for url in urls]
    body = {"input" if path == RESPONSE else "messages": [{"role": "user", "content": parts}]}
    return {**body, "max_tokens": 5} if path == MESSAGE else body


@contextmanager
def asking(**settings):
    """A client of a server, and the messages that its model was asked last."""
    backend = ScriptedBackend(lambda ask, index: words("Well."))
    with running(backend, **settings) as address, httpx.Client(base_url=address, timeout=20) as client:
        yield client, lambda: backend.asked[-1].ask.prompt


@pytest.fixture(scope="module")
def asked():
    with asking() as both:
        yield both


def refused(client, path, body):
    """What a refusal says."""
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize(("path", "part"), IMAGES, ids=lambda one: str(one)[:30])
def test_an_image_in_a_data_url_is_shown(asked, path, part):
    client, prompt = asked
    assert client.post(path, json=showing(path, part, data_url(png()))).status_code == 200
    (medium,) = prompt()[-1]["content"]
    assert isinstance(medium, Media)
    assert medium.kind is Kind.IMAGE
    assert medium.source == png()


@pytest.mark.parametrize(("path", "part"), VIDEOS, ids=lambda one: str(one)[:30])
def test_a_video_in_a_data_url_is_shown(asked, path, part):
    client, prompt = asked
    moving = animation(film(4, 24, 24), "GIF", milliseconds=100)
    assert client.post(path, json=showing(path, part, data_url(moving, "video/mp4"))).status_code == 200
    (medium,) = prompt()[-1]["content"]
    assert medium.kind is Kind.VIDEO
    assert medium.source == moving


@pytest.mark.parametrize(("path", "part"), [*IMAGES, *VIDEOS], ids=lambda one: str(one)[:30])
@pytest.mark.parametrize(
    "url", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "~/x.png", "ftp://x/y"]
)
def test_no_file_and_no_address_is_opened_for_a_request(asked, path, part, url):
    assert "data URL" in refused(asked[0], path, showing(path, part, url))


class Pictures(BaseHTTPRequestHandler):
    """A site with one picture."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(png())))
        self.end_headers()
        self.wfile.write(png())

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("path", "part"), IMAGES, ids=lambda one: str(one)[:30])
def test_an_address_is_fetched_where_that_was_allowed_and_it_is_public(monkeypatch, path, part):
    site = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=site.serve_forever, daemon=True).start()
    body = showing(path, part, f"http://127.0.0.1:{site.server_port}/a.png")
    try:
        with asking(allow_url=True) as (client, prompt):
            monkeypatch.delenv("MLX_QWEN_PRIVATE_URLS", raising=False)
            assert "private network" in refused(client, path, body)
            monkeypatch.setenv("MLX_QWEN_PRIVATE_URLS", "1")
            assert client.post(path, json=body).status_code == 200
            assert prompt()[-1]["content"][0].source == png()
            assert "data URL" in refused(client, path, showing(path, part, "file:///etc/passwd"))
    finally:
        site.shutdown()
        site.server_close()


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(asked):
    bomb = io.BytesIO()
    Image.new("1", (12000, 7000)).save(bomb, "PNG")
    assert "pixels" in refused(asked[0], CHAT, showing(*IMAGES[0], data_url(bomb.getvalue())))


def test_more_images_than_the_server_reads_are_refused():
    with asking(max_images=2) as (client, _):
        shown = [data_url(png())] * 3
        assert client.post(CHAT, json=showing(*IMAGES[0], *shown[:2])).status_code == 200
        assert "more than 2 images" in refused(client, CHAT, showing(*IMAGES[0], *shown))


def test_images_of_too_many_pixels_together_are_refused():
    with asking(max_image_pixels=1e-4) as (client, _):
        shown = [data_url(png(10, 10))] * 5
        assert client.post(CHAT, json=showing(*IMAGES[0], *shown[:4])).status_code == 200
        assert "together" in refused(client, CHAT, showing(*IMAGES[0], *shown))


def test_bytes_that_are_no_image_are_refused(asked):
    for url in ("data:image/png;base64,%%%", "data:image/png,abc"):
        refused(asked[0], CHAT, showing(*IMAGES[0], url))
