"""Answers about images: wherever an image is given, the model sees it, once, in its place."""

import io
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mlx_qwen.cli import main
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import batch_generate, generate, stream_generate
from mlx_qwen.loading import load
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import PromptInputs, prompt_inputs
from tests.support.checkpoints import reference_model
from tests.vision.drawing import drawing
from tests.vision.prompts import IMAGE, type_ids, without_media_tokens

Seeing = tuple[Model, Processor]
CAT, DOG = drawing(32, 24), drawing(16, 48)
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def user(*parts: object) -> dict[str, object]:
    """A user's message of texts and images."""
    content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image", "image": x} for x in parts]
    return {"role": "user", "content": content}


def inputs(seeing: Seeing, prompt: object, **options: object) -> PromptInputs:
    return prompt_inputs(seeing[1], prompt, GenerationOptions(**options))  # type: ignore[arg-type]


def answer(seeing: Seeing, prompt: object, **options: object) -> list[int]:
    options = {"temperature": 0, "max_tokens": 8, **options}
    return [r.token for r in stream_generate(*seeing, prompt, **options)]  # type: ignore[arg-type]


def test_an_answer_about_two_images_is_transformers(seeing: Seeing, seeing_folder: Path) -> None:
    messages = [user(CAT, "and", DOG, "what?")]
    read = inputs(seeing, messages)
    assert read.images is not None
    ids = np.array([read.ids])
    with torch.no_grad():
        expected = reference_model(seeing_folder).generate(  # type: ignore[operator]
            torch.tensor(ids), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0,
            mm_token_type_ids=type_ids(ids), pixel_values=torch.tensor(np.array(read.images.pixel_values)),
            image_grid_thw=torch.tensor(np.array(read.images.grid_thw)),
        )[0, ids.shape[1] :]  # fmt: skip
    assert answer(seeing, messages) == expected.tolist()


def test_logits_of_images_of_every_size_equal_transformers_from_pixels_on(seeing: Seeing, seeing_folder: Path) -> None:
    reference = reference_model(seeing_folder)
    prepare = Qwen2VLImageProcessorPil(
        patch_size=4, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": 64, "longest_edge": 4096}
    )
    for width, height in ((1, 1), (97, 13), (9, 120), (300, 200)):
        image = drawing(width, height)
        read = inputs(seeing, [user("look", image, "what?")])
        assert read.images is not None
        ids, theirs = np.array([read.ids]), prepare(images=[image], return_tensors="pt")
        with torch.no_grad():
            reference.model.rope_deltas = None  # type: ignore[union-attr]
            expected = reference(
                torch.tensor(ids), mm_token_type_ids=type_ids(ids), use_cache=False, **theirs
            ).logits.numpy()
        given = {"pixel_values": read.images.pixel_values, "image_grid_thw": read.images.grid_thw}
        assert np.abs(np.array(seeing[0](mx.array(ids), **given)) - expected).max() <= 2e-4 * np.abs(expected).max()


def test_each_placeholder_becomes_as_many_tokens_as_its_image_has_features(seeing: Seeing) -> None:
    read = inputs(seeing, [user(CAT, "and", DOG)])
    assert read.images is not None
    assert [grid.tokens(2) for grid in read.images.grids] == [12, 12]
    assert read.ids.count(IMAGE) == 24
    first = read.ids.index(IMAGE)
    assert read.ids[first - 1 : first + 13] == [302, *[IMAGE] * 12, 303]


@pytest.mark.parametrize("form", ["openai", "plain", "text", "ids"])
def test_every_form_of_prompt_shows_the_same_image(seeing: Seeing, form: str) -> None:
    expected = inputs(seeing, [user(CAT, "what?")])
    buffer = io.BytesIO()
    CAT.save(buffer, "PNG")
    text = seeing[1].apply_chat_template([user(CAT, "what?")])
    assert text.count(PLACE) == 1
    openai = {"type": "image_url", "image_url": {"url": buffer.getvalue()}}
    prompts: dict[str, tuple[object, dict[str, object]]] = {
        "openai": ([{"role": "user", "content": [openai, "what?"]}], {}),
        "plain": ([{"role": "user", "content": "what?"}], {"images": [CAT]}),
        "text": (text, {"images": [CAT]}),
        "ids": (expected.ids, {"images": [CAT]}),
    }
    prompt, options = prompts[form]
    found = inputs(seeing, prompt, **options)
    assert found.ids == expected.ids
    assert found.images is not None and expected.images is not None
    assert mx.array_equal(found.images.pixel_values, expected.images.pixel_values)


@pytest.mark.parametrize("step", [1, 7, 20])
def test_a_prompt_read_in_pieces_gives_the_same_answer(seeing: Seeing, step: int) -> None:
    messages = [user("look:", CAT, "and", DOG, "what?")]
    assert answer(seeing, messages, prefill_step_size=step) == answer(seeing, messages)


def test_image_text_image_over_turns_with_a_kept_cache_equals_one_prompt(seeing: Seeing) -> None:
    model, processor = seeing
    turns = [(f"a {PLACE} b", [CAT]), (" c d", []), (f" e {PLACE} f", [DOG])]
    cache, read, seen = model.make_cache(), [], []
    options: dict[str, object] = {"logits_processors": [without_media_tokens]}
    for text, images in turns:
        read += processor.encode(text)
        seen += images
        written = answer(seeing, text, images=images, prompt_cache=cache, **options)
        assert answer(seeing, read, images=seen, **options) == written
        read += written[:-1]


def test_a_batch_with_and_without_images_equals_each_alone(seeing: Seeing) -> None:
    prompts = [[user(CAT, "what?")], [user("no picture here, only words")], [user(DOG, CAT, "both?")]]
    options = {"temperature": 0, "max_tokens": 8}
    assert batch_generate(*seeing, prompts, **options) == [generate(*seeing, p, **options) for p in prompts]  # type: ignore[arg-type]


def test_images_as_an_option_are_every_rows(seeing: Seeing) -> None:
    questions = [[user("what?")], [user("which of them?")]]
    found = batch_generate(*seeing, questions, images=[CAT, DOG], temperature=0, max_tokens=8)  # type: ignore[arg-type]
    alone = [[user(CAT, DOG, "what?")], [user(CAT, DOG, "which of them?")]]
    assert found == [generate(*seeing, p, temperature=0, max_tokens=8) for p in alone]  # type: ignore[arg-type]


def test_pixel_bounds_change_how_many_tokens_an_image_takes(seeing: Seeing) -> None:
    bounds: list[dict[str, object]] = [{}, {"max_pixels": 256}, {"min_pixels": 2048}]
    counts = [inputs(seeing, [user(CAT)], **bound).ids.count(IMAGE) for bound in bounds]
    assert counts[1] < counts[0] < counts[2]


def test_two_images_of_one_size_give_different_answers(seeing: Seeing) -> None:
    def logprobs(image: Image.Image) -> mx.array:
        return next(stream_generate(*seeing, [user(image, "what?")], temperature=0)).logprobs  # type: ignore[list-item]

    assert mx.abs(logprobs(CAT) - logprobs(CAT.rotate(180))).max().item() > 1e-3


def test_an_image_for_a_text_only_checkpoint_is_refused(chat_folder: Path) -> None:
    with pytest.raises(PromptError, match="text only"):
        stream_generate(*load(chat_folder), [user(CAT, "what?")])  # type: ignore[list-item]


def test_an_image_for_a_checkpoint_that_lost_its_tower_is_refused(seeing: Seeing, checkpoint) -> None:
    blind = load_blind(checkpoint("dense"))
    with pytest.raises(PromptError, match="no vision tower"):
        stream_generate(blind, seeing[1], [user(CAT, "what?")])  # type: ignore[list-item]


def load_blind(folder: Path) -> Model:
    from mlx_qwen.config import ModelConfig
    from mlx_qwen.loading import load_model

    return load_model(folder, ModelConfig.from_directory(folder))


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("what?", [CAT], "0 image placeholders and 1 images"),
        (PLACE, [], "1 image placeholders and 0 images"),
        (PLACE * 3, [CAT, DOG], "3 image placeholders and 2 images"),
        ([{"role": "user", "content": [{"type": "image"}]}], [], "image part without an image"),
        ([{"role": "assistant", "content": "hi"}], [CAT], 'role "user"'),
        ([{"role": "system", "content": [{"image": CAT}]}, user("hi")], [], "system. holds an image"),
        ([user(b"no image")], [], "no image that can be read"),
    ],
)
def test_images_that_do_not_fit_the_prompt_are_refused(
    seeing: Seeing, prompt: object, images: list[Image.Image], message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        inputs(seeing, prompt, images=images)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["generate", *map(str, arguments), "--temp", "0", "-m", "8", "--quiet"])


def test_the_command_shows_images_to_the_model(seeing_folder: Path, tmp_path: Path) -> None:
    files = [tmp_path / "cat.png", tmp_path / "dog.png"]
    CAT.save(files[0])
    DOG.save(files[1])
    images = [argument for file in files for argument in ("--image", file)]
    result = run("--model", seeing_folder, *images, "-p", "what?", "--max-pixels", 512)
    expected = generate(*load(seeing_folder), [user(*files, "what?")], temperature=0, max_tokens=8, max_pixels=512)  # type: ignore[list-item]
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"


@pytest.mark.parametrize("broken", ["missing", "text_only"])
def test_the_command_ends_with_one_line_when_it_cannot_see(
    broken: str, seeing_folder: Path, chat_folder: Path, tmp_path: Path
) -> None:
    CAT.save(tmp_path / "cat.png")
    folder, name = (chat_folder, "cat.png") if broken == "text_only" else (seeing_folder, "nothing.png")
    result = run("--model", folder, "--image", tmp_path / name, "-p", "?")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")
