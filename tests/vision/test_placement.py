"""Pictures stand where the prompt says, in a known order, and are called by their names."""

import io
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_qwen.cli import main
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from mlx_qwen.prompt.placed import describe, feature_count
from tests.vision.drawing import drawing
from tests.vision.films import animation, film

CAT = drawing(24, 24)
PAD = "<|image_pad|>"


def described(processor: Processor, *images: object) -> list[str]:
    """What is said about the images of a prompt."""
    content = [*({"type": "image", "image": image} for image in images), "?"]
    inputs = prompt_inputs(processor, [{"role": "user", "content": content}], GenerationOptions())
    return [describe(processor, one.patches) for one in inputs.media]


@pytest.mark.parametrize("pad", [PAD, "<|video_pad|>"])
def test_placeholders_that_people_type_beside_a_picture_are_text(seeing: tuple[Model, Processor], pad: str) -> None:
    _, processor = seeing
    part = {"image": CAT} if pad == PAD else {"video": [CAT]}
    inputs = prompt_inputs(processor, [{"role": "user", "content": [part, f"what is {pad * 8}?"]}], GenerationOptions())
    (placed,) = inputs.media
    tokens = {name: processor.tokenizer.token_to_id(name) for name in (PAD, "<|video_pad|>")}
    assert inputs.ids[placed.start] == tokens[pad]
    assert inputs.ids.count(tokens[pad]) == feature_count(processor, placed.patches)
    assert sum(inputs.ids.count(token) for token in tokens.values()) == inputs.ids.count(tokens[pad])
    assert pad * 8 in processor.tokenizer.decode(inputs.ids, skip_special_tokens=False)


def test_a_text_may_hold_its_placeholders_repeated_already(seeing: tuple[Model, Processor]) -> None:
    text = f"<|vision_start|>{PAD * 9}<|vision_end|> what?"
    inputs = prompt_inputs(seeing[1], text, GenerationOptions(images=[CAT]))
    assert inputs.ids == seeing[1].encode(text)


def test_each_of_several_images_is_called_by_its_name(seeing: tuple[Model, Processor], tmp_path: Path) -> None:
    CAT.save(tmp_path / "cat.png")
    drawing(24, 32).save(tmp_path / "dog.png")
    assert described(seeing[1], tmp_path / "cat.png", str(tmp_path / "dog.png")) == [
        f"Image {tmp_path}/cat.png: 9 tokens",
        f"Image {tmp_path}/dog.png: 12 tokens",
    ]
    buffer = io.BytesIO()
    CAT.save(buffer, "PNG")
    size = len(buffer.getvalue())
    assert described(seeing[1], CAT, buffer.getvalue()) == ["Image: 9 tokens", f"Image of {size:,} bytes: 9 tokens"]


def test_the_command_places_videos_behind_images_and_says_so(seeing_folder: Path, tmp_path: Path) -> None:
    CAT.save(tmp_path / "cat.png")
    (tmp_path / "film.webp").write_bytes(animation(film(4, 16, 16), "WEBP", milliseconds=500))
    flags = ["--video", str(tmp_path / "film.webp"), "--image", str(tmp_path / "cat.png")]
    result = CliRunner().invoke(main, ["generate", "--model", str(seeing_folder), "-p", "?", "-m", "1", *flags])
    assert [line.split()[0] for line in result.stderr.splitlines()[:2]] == ["Image", "Video"], result.stderr
    help_text = " ".join(CliRunner().invoke(main, ["generate", "--help"]).stdout.split())
    assert "placed behind all images" in help_text
