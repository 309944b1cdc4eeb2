"""Flags on the size of pictures, and on the frames of videos, change what the model sees."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_qwen.cli import main
from tests.vision.drawing import drawing
from tests.vision.films import animation, film

# Tokens of an image of 64 x 64 pixels; frames taken of 20 in two seconds, of 96 x 96 pixels, and their tokens.
SEEN = {
    (): (4, 4, 18),
    ("--max-pixels", "1024"): (1, 4, 8),
    ("--min-pixels", "9216"): (9, 4, 18),
    ("--total-pixels", "16384"): (4, 4, 8),
    ("--fps", "4"): (4, 8, 36),
    ("--min-frames", "6"): (4, 6, 27),
    ("--max-frames", "2"): (4, 2, 9),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An image and a video."""
    folder = tmp_path_factory.mktemp("media")
    drawing(64, 64).save(folder / "image.png")
    (folder / "film.webp").write_bytes(animation(film(20, 96, 96), "WEBP", milliseconds=100))
    return str(folder / "image.png"), str(folder / "film.webp")


def seen(printed: str) -> tuple[int, ...]:
    """Tokens of the image, frames and tokens of the video."""
    found = re.search(r"Image .*: (\d+) tokens.*Video .*: (\d+) of 20 frames, (\d+) tokens", printed, re.DOTALL)
    assert found is not None, printed
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize("flags", SEEN, ids=lambda flags: flags[0] if flags else "none")
def test_generate_prints_what_each_flag_makes_of_pictures(flags: tuple[str, ...], files: tuple[str, str]) -> None:
    shown = ("--image", files[0], "--video", files[1], "-p", "?", "-m", "1", "--temp", "0")
    result = CliRunner().invoke(main, ["generate", *shown, *flags])
    assert result.exit_code == 0, result.stderr
    assert seen(result.stderr) == SEEN[flags]


@pytest.mark.parametrize("flags", [("--max-pixels", "1024"), ("--fps", "4")], ids=lambda flags: flags[0])
def test_chat_prints_what_its_flags_make_of_pictures(flags: tuple[str, ...], files: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, ["chat", *flags], input=f"/image {files[0]}\n/video {files[1]}\n/quit\n")
    assert seen(result.stderr) == SEEN[flags]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--image", "one.png", "two words.png", "?"],
        ["--image", "one.png", "--image", "two words.png", "?"],
        ["--image=one.png", "two words.png", "?"],
        ["?", "--image", "one.png", "two words.png"],
        ["-p", "?", "--image", "one.png", "two words.png", "-m", "1"],
        ["--image", "one.png", "two words.png", "--", "?"],
    ],
    ids=["together", "repeated", "equals", "last", "prompt-as-flag", "dashes"],
)
def test_a_flag_takes_several_pictures_and_no_question(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    drawing(64, 64).save("one.png")
    drawing(32, 64).save("two words.png")
    result = CliRunner().invoke(main, ["generate", "-m", "1", "--temp", "0", *arguments])
    assert result.exit_code == 0, result.stderr
    assert re.findall(r"Image (.*): \d+ tokens", result.stderr) == ["one.png", "two words.png"]


def test_a_second_picture_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawing(64, 64).save("one.png")
    result = CliRunner().invoke(main, ["generate", "--image", "one.png", "two.png", "What is in one.png?"])
    assert result.exit_code == 1
    assert "The image two.png cannot be read (No such file or directory)" in result.stderr
