"""`mlx-qwen chat` shows images and videos, which later turns know without looking again."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_qwen.cli import main
from mlx_qwen.conversation import Conversation
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate
from mlx_qwen.loading import load
from mlx_qwen.media.grids import Grid, Kind
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from tests.vision.drawing import drawing
from tests.vision.films import animation, film
from tests.vision.prompts import without_media_tokens

Seeing = tuple[Model, Processor]
OPTIONS = GenerationOptions(temperature=0, max_tokens=4, logits_processors=[without_media_tokens])


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """An image and a video."""
    drawing(16, 24).save(tmp_path / "cat.png")
    (tmp_path / "film.webp").write_bytes(animation(film(6, 16, 16), "WEBP", milliseconds=500))
    return str(tmp_path / "cat.png"), str(tmp_path / "film.webp")


def ask(conversation: Conversation, question: str) -> list[int]:
    turn = conversation.ask(question)
    list(turn)
    conversation.remember(turn)
    return turn.tokens


def chat(folder: Path, *lines: str) -> Result:
    flags = ["--model", str(folder), "--temp", "0", "-m", "4", "--no-thinking"]
    return CliRunner().invoke(main, ["chat", *flags], input="\n".join(lines) + "\n")


def test_later_turns_do_not_run_the_tower_again(
    seeing_folder: Path, seen: list[list[Grid]], files: tuple[str, str]
) -> None:
    conversation = Conversation(*load(seeing_folder), OPTIONS)
    conversation.attach(Kind.IMAGE, files[0])
    conversation.attach(Kind.VIDEO, files[1])
    ask(conversation, "What is this?")
    assert len(seen) == 2
    ask(conversation, "And now?")
    conversation.system = "Be brief."  # the whole history is another one, and read anew
    ask(conversation, "Once more?")
    assert len(seen) == 2


def test_a_turn_answers_as_generate_does_on_the_whole_history(seeing: Seeing, files: tuple[str, str]) -> None:
    conversation = Conversation(*seeing, OPTIONS)
    conversation.attach(Kind.IMAGE, files[0])
    ask(conversation, "What is this?")
    conversation.attach(Kind.VIDEO, files[1])
    found = ask(conversation, "And this?")
    history = [dict(message) for message in conversation.turns[:3]]
    history[0]["content"] = [{"type": "image", "image": files[0]}, "What is this?"]
    history[2]["content"] = [{"type": "video", "video": files[1]}, "And this?"]
    expected = generate(*seeing, history, temperature=0, max_tokens=4, logits_processors=[without_media_tokens])
    assert seeing[1].decode(found) == expected


def test_the_command_shows_what_is_attached(seeing_folder: Path, files: tuple[str, str]) -> None:
    result = chat(seeing_folder, f"/image {files[0]}", f"/video {files[1]}", "What?", "/quit")
    assert result.exit_code == 0, result.stderr
    assert f"Image {files[0]}: 6 tokens; it goes with your next question." in result.stderr
    assert "6 of 6 frames, 12 tokens, at 0.2, 1.2, 2.2 seconds" in result.stderr
    parts = [{"type": "image", "image": files[0]}, {"type": "video", "video": files[1]}, "What?"]
    expected = generate(
        *load(seeing_folder), [{"role": "user", "content": parts}], temperature=0, max_tokens=4, enable_thinking=False
    )
    assert expected in result.stdout


def test_what_cannot_be_shown_is_refused_and_the_chat_goes_on(
    seeing_folder: Path, chat_folder: Path, files: tuple[str, str]
) -> None:
    result = chat(seeing_folder, "/image nothing.png", "/video", "/help", "/quit")
    assert "Error: The image nothing.png cannot be read" in result.stderr
    assert "/video needs the path or URL" in result.stderr
    assert all(word in result.stdout for word in ("/image PATH", "/video PATH"))
    assert "for text only" in chat(chat_folder, f"/image {files[0]}", "/quit").stderr


def test_reset_forgets_what_is_attached(seeing: Seeing, files: tuple[str, str]) -> None:
    conversation, fresh = Conversation(*seeing, OPTIONS), Conversation(*seeing, OPTIONS)
    conversation.attach(Kind.IMAGE, files[0])
    conversation.reset()
    assert ask(conversation, "Hello") == ask(fresh, "Hello")


def test_a_question_that_was_refused_keeps_its_image_for_the_next(seeing: Seeing, files: tuple[str, str]) -> None:
    conversation, fresh = Conversation(*seeing, OPTIONS), Conversation(*seeing, OPTIONS)
    for each in (conversation, fresh):
        each.attach(Kind.IMAGE, files[0])
    with pytest.raises(PromptError, match="context ends"):
        conversation.ask("x " * 3000)
    assert np.array_equal(ask(conversation, "What?"), ask(fresh, "What?"))
