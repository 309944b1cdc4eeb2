"""Images from anywhere become the patches that transformers makes of them."""

import base64
import io
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.media import image_sources
from mlx_qwen.media.grids import Grid
from mlx_qwen.media.image_sources import open_image
from mlx_qwen.media.images import ImageProcessor
from mlx_qwen.media.limits import MediaLimits
from tests.vision.drawing import VISION, drawing

SIZES = [(64, 64), (33, 97), (97, 33), (1, 1), (5, 900), (640, 480), (200, 1), (31, 32)]


def reference(**size: int) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, size=size
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("low", "high"), [(65536, 16777216), (1024, 4096), (1024, 100_000)])
def test_patches_and_grids_equal_transformers_for_every_size(low: int, high: int) -> None:
    ours, theirs = ImageProcessor(min_pixels=low, max_pixels=high), reference(shortest_edge=low, longest_edge=high)
    for width, height in SIZES:
        image = drawing(width, height)
        expected, found = theirs(images=[image], return_tensors="np"), ours([image])
        assert found.grids == tuple(Grid(*map(int, row)) for row in expected["image_grid_thw"])
        assert np.abs(np.array(found.pixel_values) - expected["pixel_values"]).max() <= 1e-6


def test_several_images_come_one_after_the_other() -> None:
    ours, images = ImageProcessor(min_pixels=1024), [drawing(64, 32), drawing(40, 90)]
    together, alone = ours(images), [ours([image]) for image in images]
    assert together.grids == alone[0].grids + alone[1].grids
    assert (np.array(together.pixel_values) == np.concatenate([np.array(one.pixel_values) for one in alone])).all()


def test_bounds_come_from_the_checkpoint_and_can_be_overridden() -> None:
    settings = {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "image_mean": [0.1, 0.2, 0.3]}
    processor = ImageProcessor.from_config(VISION, settings)
    assert (processor.min_pixels, processor.max_pixels, processor.layout.mean) == (1024, 4096, (0.1, 0.2, 0.3))
    assert processor.limited(MediaLimits(max_pixels=512)).resized(999, 999) == (16, 16)
    assert processor.limited(MediaLimits(min_pixels=9000)).max_pixels == 9000
    with pytest.raises(PromptError, match="max_pixels is 10"):
        MediaLimits(min_pixels=20, max_pixels=10)


def test_unusable_settings_of_a_checkpoint_are_named() -> None:
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_config(VISION, {"size": {"shortest_edge": "small"}})


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "a.png").write_bytes(encoded(drawing(20, 30)))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as allowing:
        allowing.setenv("MLX_QWEN_PRIVATE_URLS", "1")
        yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_every_source_gives_the_same_image(tmp_path: Path, url: str) -> None:
    image = drawing(20, 30)
    data = encoded(image)
    (tmp_path / "a.png").write_bytes(data)
    sources = [
        tmp_path / "a.png", str(tmp_path / "a.png"), f"file://{tmp_path}/a.png", data, image, np.asarray(image),
        f"data:image/png;base64,{base64.b64encode(data).decode()}", f"{url}/a.png",
    ]  # fmt: skip
    for source in sources:
        opened = open_image(source)
        assert (opened.mode, opened.size) == ("RGB", (20, 30))
        assert (np.asarray(opened) == np.asarray(image)).all()


@pytest.mark.parametrize("start", ["file://", "FILE://", "file://localhost"])
def test_a_file_url_is_unquoted(tmp_path: Path, start: str) -> None:
    drawing(20, 30).save(tmp_path / "a b.png")
    assert open_image(f"{start}{tmp_path}/a%20b.png").size == (20, 30)
    drawing(30, 20).save(tmp_path / "a%20b.png")
    assert open_image(f"{tmp_path}/a%20b.png").size == (30, 20)


def test_an_image_is_turned_as_its_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_image(encoded(drawing(20, 30), exif=exif))
    assert turned.size == (30, 20)
    assert (np.asarray(turned) == np.rot90(np.asarray(drawing(20, 30)), -1)).all()


def half_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparent_parts_stand_on_white(mode: str) -> None:
    pixels = np.asarray(open_image(encoded(half_transparent(mode))))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_a_16_bit_image_keeps_its_brightness() -> None:
    ramp = np.array([[0, 32896, 65535]], np.uint16)
    for source in (encoded(Image.fromarray(ramp)), ramp):
        assert np.asarray(open_image(source))[0, :, 0].tolist() == [0, 128, 255]


def test_floats_count_from_0_to_1_and_what_overshoots_a_little_is_clipped() -> None:
    floats = np.array([[-0.4, 0, 0.5, 1, 1.4]], np.float32)
    for source in (floats, Image.fromarray(floats), encoded(Image.fromarray(floats), "TIFF")):
        assert np.asarray(open_image(source))[0, :, 1].tolist() == [0, 0, 128, 255, 255]


OTHER_NUMBERS = {
    "floats_to_255": (np.array([[0, 128.0, 255]]), "values up to 255: floats count from 0 to 1"),
    "floats_around_0": (np.array([[-1, 0.5, 1.0]]), "values down to -1: floats count from 0 to 1"),
    "infinite": (np.array([[0, np.inf]]), "values up to inf"),
    "over_16_bits": (np.array([[0, 100_000]]), "values up to 100,000"),
    "complex": (np.array([[0, 1j]]), "values of type complex128; expected integers, floats or booleans"),
    "objects": (np.array([[object()]]), "values of type object"),
    "texts": (np.array([["a"]]), "values of type <U1"),
}


@pytest.mark.parametrize("case", OTHER_NUMBERS)
def test_numbers_that_are_no_pixels_are_refused(case: str) -> None:
    pixels, message = OTHER_NUMBERS[case]
    with pytest.raises(PromptError, match=f"The array holds {message}"):
        open_image(pixels)


def test_a_file_of_floats_that_are_no_pixels_is_refused_by_name(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 128, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(PromptError, match=r"a\.tiff holds values up to 128: floats count from 0 to 1"):
        open_image(tmp_path / "a.tiff")


def test_16_bits_in_any_byte_order_are_16_bits() -> None:
    for dtype in ("<u2", ">u2"):
        assert np.asarray(open_image(np.array([[200]], dtype)))[0, 0, 0] == 1


def test_cmyk_becomes_rgb() -> None:
    pixels = np.asarray(open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() < 10


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    animation = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(open_image(animation))[0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """100 megapixels in a few kilobytes."""
    return encoded(Image.new("1", (10_000, 10_000)))


def sideless(kind: str, place: int) -> bytes:
    """A file of 0 x 9 pixels, which pillow does not write; 4 bytes from `place` on are its width."""
    data = encoded(drawing(9, 9), kind)
    return data[:place] + bytes(4) + data[place + 4 :]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "bomb": (bomb, "100,000,000 pixels, more than 89,478,485"),
    "truncated": (lambda: encoded(drawing(90, 90), "JPEG")[:1500], "truncated or damaged"),
    "truncated_png": (lambda: encoded(drawing(90, 90))[:-600], "truncated or damaged"),
    "no_image": (lambda: b"hello", "no image that can be read"),
    "empty": (lambda: b"", "no image that can be read"),
    "empty_text": (lambda: "", "The image is an empty text"),
    "folder": (Path, "Is a directory"),
    "missing": (lambda: "/nowhere/a.png", "cannot be read"),
    "zero_area": (lambda: Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    "sideless_png": (lambda: sideless("PNG", 16), "bytes is 0 x 9 pixels large, expected at least 1 x 1"),
    "sideless_gif": (lambda: b"GIF89a\x00\x00\x09\x00\x00\x00\x00;", "bytes is 0 x 9 pixels large"),
    "sideless_bmp": (lambda: sideless("BMP", 18), "bytes is 0 x 9 pixels large"),
    "zero_array": (lambda: np.zeros((4, 0, 3)), "at least 1 x 1"),
    "channels_first": (lambda: np.zeros((3, 8, 8)), "channels last"),
    "data_url": (lambda: "data:image/png;base64,!!", "data URL"),
    "plain_data_url": (lambda: "data:image/png,abc", ";base64"),
    "unreachable": (lambda: "http://127.0.0.1:9/a.png", "cannot be downloaded"),
    "shouted": (lambda: "HTTP://127.0.0.1:9/a.png", "cannot be downloaded"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_usable_image_is_refused_with_the_reason(case: str) -> None:
    source, message = REFUSED[case]
    with pytest.raises(PromptError, match=message):
        open_image(source())  # type: ignore[arg-type]


def test_a_download_that_never_ends_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "MOST_BYTES", 10)
    with pytest.raises(PromptError, match="larger than"):
        open_image(f"{url}/a.png")


def test_an_image_as_thin_as_a_thread_is_refused_by_name(tmp_path: Path) -> None:
    drawing(1, 201).save(tmp_path / "thin.png")
    for source, name in ((drawing(1, 201), "The image"), (tmp_path / "thin.png", r"thin\.png")):
        with pytest.raises(PromptError, match=f"{name} is 1 x 201 pixels, more than 200 times"):
            ImageProcessor()([drawing(64, 64), source])
