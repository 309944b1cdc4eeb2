"""Nothing that a content part holds is dropped: what cannot be read beside the rest is refused by name."""

import numpy as np
import pytest
from PIL import Image

from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Kind
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.prompt.media_parts import Media, message_media
from mlx_qwen.prompt.messages import prepare_messages

CAT, DOG = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def media(*parts: object) -> list[Media]:
    """The media of a user's message that templates can render."""
    messages = [{"role": "user", "content": parts}]
    prepare_messages(messages)
    return message_media(messages)


MIXED = {
    "text_with_image": ({"type": "text", "text": "hi", "image": CAT}, "text and an image"),
    "empty_text_with_image": ({"type": "text", "text": "", "image": CAT}, "text and an image"),
    "text_with_audio": ({"type": "text", "text": "hi", "audio": "a.mp3"}, "text and audio"),
    "image_with_caption": ({"type": "image", "image": CAT, "text": "caption"}, "text and an image"),
    "untyped_caption": ({"image": CAT, "text": "caption"}, "text and an image"),
    "image_with_video": ({"image": CAT, "video": [DOG]}, "an image and a video"),
    "video_with_image_url": ({"type": "video", "video": [DOG], "image_url": {"url": "a.png"}}, "an image and a video"),
    "array": ({"type": "text", "text": "hi", "image": np.zeros((8, 8, 3))}, "text and an image"),
}


@pytest.mark.parametrize("case", MIXED)
def test_a_part_that_holds_more_than_one_thing_is_refused(case: str) -> None:
    part, held = MIXED[case]
    for read in (message_media, prepare_messages):
        with pytest.raises(PromptError, match=f"Message 0.* has one part with {held}; make each a part of its own"):
            read([{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": CAT, "url": "b.png"},
        {"image": CAT, "image_url": "b.png"},
        {"type": "image", "url": "a.png", "path": "b.png"},
    ],
)
def test_a_part_with_two_sources_is_refused(part: dict[str, object]) -> None:
    with pytest.raises(PromptError, match=r"Message 0 gives an image as '\w+' and as '\w+'; keep one of them"):
        media(part)


@pytest.mark.parametrize(
    ("part", "unknown"),
    [
        ({"type": "image", "image": CAT, "max_pixel": 3}, "an image 'max_pixel'"),
        ({"type": "image", "image": CAT, "fps": 3}, "an image 'fps'"),
        ({"type": "image_url", "image_url": {"url": "a.png", "max_pixel": 3}}, "an image 'max_pixel'"),
        ({"type": "video", "video": [CAT], "fsp": 3}, "a video 'fsp'"),
        ({"type": "video_url", "video_url": {"url": "a.mp4", "fsp": 3}}, "a video 'fsp'"),
    ],
)
def test_an_option_that_is_none_is_refused(part: dict[str, object], unknown: str) -> None:
    with pytest.raises(PromptError, match=f"Message 0 gives {unknown}; expected min_pixels, max_pixels"):
        media(part)


def test_openais_forms_of_an_image_are_understood() -> None:
    nested = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "max_pixels": 99}
    flat = {"type": "input_image", "image_url": "a.png", "detail": "high"}
    assert media(nested, flat) == [Media(Kind.IMAGE, "a.png", MediaLimits(max_pixels=99)), Media(Kind.IMAGE, "a.png")]


def test_fields_that_a_table_left_empty_do_not_count() -> None:
    image = {"type": "image", "image": CAT, "text": None, "video": None, "url": None, "max_pixel": None}
    text = {"type": "text", "text": "hi", "image": None, "video": []}
    assert media(image, text, {"text": "hi", "image": None}) == [Media(Kind.IMAGE, CAT)]
    image = {"type": "image", "image": CAT, "text": "", "video": "", "url": "", "max_pixel": []}
    film = {"image": "", "video": {"url": "a.mp4", "file_id": None}, "url": ""}
    assert media(image, film, {"text": "hi", "image": ""}) == [Media(Kind.IMAGE, CAT), Media(Kind.VIDEO, "a.mp4")]


@pytest.mark.parametrize("name", ["images", "videos", "image", "video_url"])
def test_media_beside_the_content_are_refused(name: str) -> None:
    with pytest.raises(PromptError, match=f"Message 0 has '{name}' beside its content"):
        prepare_messages([{"role": "user", "content": "What is this?", name: ["a.png"]}])
    assert prepare_messages([{"role": "user", "content": "What is this?", name: []}])


def test_an_object_that_is_no_json_is_named_by_its_type() -> None:
    with pytest.raises(PromptError, match="Message 0 holds a value of type Image; use text"):
        prepare_messages([{"role": "user", "content": "hi", "picture": CAT}])
