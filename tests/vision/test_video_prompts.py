"""Answers about videos: wherever a video is given, the model sees its frames, in their place and at their times."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mlx_qwen.cli import main
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import batch_generate, generate, stream_generate
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import PromptInputs, prompt_inputs
from tests.support.checkpoints import reference_model
from tests.vision.drawing import drawing
from tests.vision.films import animation, film
from tests.vision.prompts import VIDEO, type_ids, without_media_tokens

Seeing = tuple[Model, Processor]
FILM, CAT = film(12, 24, 24), drawing(16, 24)
PLACE = "<|vision_start|><|video_pad|><|vision_end|>"


def video(source: object, **options: object) -> dict[str, object]:
    return {"type": "video", "video": source, **options}


def user(*parts: object) -> dict[str, object]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def inputs(seeing: Seeing, prompt: object, **options: object) -> PromptInputs:
    return prompt_inputs(seeing[1], prompt, GenerationOptions(**options))  # type: ignore[arg-type]


def answer(seeing: Seeing, prompt: object, **options: object) -> list[int]:
    return [r.token for r in stream_generate(*seeing, prompt, temperature=0, max_tokens=6, **options)]  # type: ignore[arg-type]


def test_an_answer_about_a_video_and_an_image_is_transformers(seeing: Seeing, seeing_folder: Path) -> None:
    messages = [user("first", video(FILM[:6]), "then", {"type": "image", "image": CAT}, "what?")]
    read = inputs(seeing, messages)
    assert read.images is not None and read.videos is not None
    ids = np.array([read.ids])
    media = {
        "pixel_values": read.images.pixel_values, "image_grid_thw": read.images.grid_thw,
        "pixel_values_videos": read.videos.pixel_values, "video_grid_thw": read.videos.grid_thw,
    }  # fmt: skip
    with torch.no_grad():
        expected = reference_model(seeing_folder).generate(  # type: ignore[operator]
            torch.tensor(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0,
            mm_token_type_ids=type_ids(ids), **{name: torch.tensor(np.array(x)) for name, x in media.items()},
        )[0, ids.shape[1] :]  # fmt: skip
    assert answer(seeing, messages) == expected.tolist()


@pytest.mark.parametrize("form", ["openai", "keyword", "text", "ids"])
def test_every_form_of_prompt_shows_the_same_video(seeing: Seeing, form: str) -> None:
    data = animation(FILM, "WEBP", milliseconds=250)
    expected = inputs(seeing, [user(video(data), "what?")])
    openai = {"type": "video_url", "video_url": {"url": data}}
    text = seeing[1].apply_chat_template([user(video(data), "what?")])
    assert text.count(PLACE) == 1
    prompts: dict[str, tuple[object, dict[str, object]]] = {
        "openai": ([user(openai, "what?")], {}),
        "keyword": ([{"role": "user", "content": "what?"}], {"videos": [data]}),
        "text": (text, {"videos": [data]}),
        "ids": (expected.ids, {"videos": [data]}),
    }
    prompt, options = prompts[form]
    found = inputs(seeing, prompt, **options)
    assert found.ids == expected.ids
    assert found.videos is not None and expected.videos is not None
    assert np.array_equal(np.array(found.videos.pixel_values), np.array(expected.videos.pixel_values))


def test_a_videos_own_choices_come_before_the_prompts(seeing: Seeing) -> None:
    both = [user(video(FILM, source_fps=4, max_frames=2), video(FILM, source_fps=4), "?")]
    videos = inputs(seeing, both, fps=4).videos
    assert videos is not None
    assert [grid.frames for grid in videos.grids] == [1, 6]


def test_images_and_videos_over_turns_with_a_kept_cache_equal_one_prompt(seeing: Seeing) -> None:
    model, processor = seeing
    image_place = PLACE.replace("video", "image")
    turns = [(f"a {PLACE} b", [], [FILM[:4]]), (" c", [], []), (f" d {image_place}{PLACE} e", [CAT], [FILM[4:]])]
    cache, read, images, videos = model.make_cache(), [], [], []
    options: dict[str, object] = {"logits_processors": [without_media_tokens]}
    for text, new_images, new_videos in turns:
        read += processor.encode(text)
        images += new_images
        videos += new_videos
        written = answer(seeing, text, images=new_images, videos=new_videos, prompt_cache=cache, **options)
        assert answer(seeing, read, images=images, videos=videos, **options) == written
        read += written[:-1]


def test_a_batch_with_videos_images_and_text_equals_each_alone(seeing: Seeing) -> None:
    prompts = [[user(video(FILM[:4]), "what?")], [user("words")], [user({"image": CAT}, video(FILM[:8]), "?")]]
    options = {"temperature": 0, "max_tokens": 6}
    assert batch_generate(*seeing, prompts, **options) == [generate(*seeing, p, **options) for p in prompts]  # type: ignore[arg-type]


def test_a_later_turn_about_the_same_video_does_not_run_the_tower(seeing: Seeing, seen: list[list[Grid]]) -> None:
    for question in ("what?", "and now?"):
        answer(seeing, [user(video(film(4, 30, 30)), question)])
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("prompt", "videos", "message"),
    [
        ("what?", [FILM], "0 video placeholders and 1 videos"),
        (PLACE, [], "1 video placeholders and 0 videos"),
        ("a <|video_pad|> in text", [], "1 video placeholders and 0 videos.*text must not hold these tokens"),
        ([user({"type": "video"})], [], "a video part without a video"),
        ([user(video(FILM, fsp=3), "?")], [], "a video 'fsp'; expected min_pixels"),
        ([user({"type": "image", "image": CAT, "fps": 2}, "?")], [], "an image 'fps'; expected min_pixels, max_pixels"),
        ([{"role": "system", "content": [video(FILM)]}, user("hi")], [], "system. holds an image or video"),
        ([user(video([]), "?")], [], "has no frames"),
    ],
)
def test_videos_that_do_not_fit_the_prompt_are_refused(
    seeing: Seeing, prompt: object, videos: list[object], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        inputs(seeing, prompt, videos=videos)


@pytest.mark.parametrize("pad", ["<|image_pad|>", "<|video_pad|>"])
def test_a_stray_placeholder_for_a_checkpoint_that_reads_text_is_refused(seeing: Seeing, pad: str) -> None:
    blind = Processor(seeing[1].tokenizer, template=None, end_token_ids=frozenset())
    with pytest.raises(PromptError, match="for text only"):
        prompt_inputs(blind, f"what is {pad}?", GenerationOptions())


def test_a_single_video_that_is_no_list_is_refused() -> None:
    with pytest.raises(PromptError, match="a list of videos"):
        GenerationOptions(videos="a.mp4")  # type: ignore[arg-type]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments), "--temp", "0", "-m", "4"])


def test_the_command_shows_a_video_and_prints_frames_tokens_and_timestamps(seeing_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "film.webp"
    file.write_bytes(animation(FILM, "WEBP", milliseconds=100))
    result = run("--model", seeing_folder, "--video", file, "-p", "what?", "--fps", 5, "--max-frames", 4)
    assert result.exit_code == 0, result.stderr
    assert f"Video {file}: 4 of 12 frames, 18 tokens, at 0.2, 0.9 seconds" in result.stderr
    assert run("--model", seeing_folder, "--video", file, "-p", "?", "--fps", 0).exit_code == 1


def test_an_image_is_described_too(seeing_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    result = run("--model", seeing_folder, "--image", tmp_path / "a.png", "-p", "?")
    assert f"Image {tmp_path / 'a.png'}: 4 tokens" in result.stderr


def as_published(text: str, timestamps: tuple[float, ...], tokens: int) -> str:
    """The text that the family's processor (transformers 4.57 to 5.9, vLLM) makes of one with a video in it."""
    place = ""
    for time in timestamps:
        place += f"<{time:.1f} seconds>"
        place += "<|vision_start|>" + "<|placeholder|>" * tokens + "<|vision_end|>"
    text = text.replace(PLACE if PLACE in text else "<|video_pad|>", place, 1)
    return text.replace("<|placeholder|>", "<|video_pad|>")


@pytest.mark.parametrize("text", [f"a {PLACE} b", f"{PLACE}", "a <|video_pad|> b", "<|vision_start|><|video_pad|> b"])
def test_frames_stand_in_the_place_of_the_placeholder_and_its_marks_as_published(seeing: Seeing, text: str) -> None:
    found = inputs(seeing, text, videos=[FILM[:6]])
    assert found.ids == seeing[1].encode(as_published(text, (0.25, 1.25, 2.25), 9))


def test_the_marks_around_an_image_stay(seeing: Seeing) -> None:
    text = PLACE.replace("video", "image")
    found = inputs(seeing, f"{text} and {PLACE}", images=[CAT], videos=[FILM[:2]])
    decoded = seeing[1].decode(found.ids)
    assert decoded.startswith("<|vision_start|><|image_pad|>") and "<|image_pad|><|vision_end|>" in decoded


def test_placeholders_of_videos_stand_between_their_timestamps(seeing: Seeing) -> None:
    read = inputs(seeing, [user(video(FILM[:4]), "?")])
    assert [one.start for one in read.media] == [read.ids.index(VIDEO)]
    text = seeing[1].decode(read.ids)
    frame = "<|vision_start|>" + "<|video_pad|>" * 9 + "<|vision_end|>"
    assert f"user\n<0.2 seconds>{frame}<1.2 seconds>{frame}?" in text
