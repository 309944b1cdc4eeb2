"""Logits of prompts with images and videos are transformers', however the tokens arrive."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.support.checkpoints import Kind, reference_model
from tests.vision.prompts import Prompt, conversations, ours, theirs, type_ids

Checkpoint = Callable[..., Path]
TOLERANCE = 2e-4


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def reference_logits(path: Path, *prompts: Prompt) -> list[np.ndarray]:
    reference, found = reference_model(path), []
    for prompt in prompts:
        ids = prompt.input_ids
        with torch.no_grad():
            reference.model.rope_deltas = None  # type: ignore[union-attr]
            logits = reference(
                input_ids=torch.tensor(ids), mm_token_type_ids=type_ids(ids), use_cache=False, **theirs(prompt)
            ).logits
        found.append(logits.numpy())
    return found


def assert_close(found: mx.array | np.ndarray, expected: mx.array | np.ndarray) -> None:
    """Within 2e-4 of the largest absolute logit."""
    assert np.abs(np.array(found) - np.array(expected)).max() <= TOLERANCE * np.abs(np.array(expected)).max()


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_logits_equal_transformers(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind)
    model, prompts = load(path), conversations().values()
    for prompt, expected in zip(prompts, reference_logits(path, *prompts), strict=True):
        assert_close(model(mx.array(prompt.input_ids), **ours(prompt)), expected)


@pytest.mark.parametrize("kind", ["dense_vl", "moe_vl"])
def test_image_text_image_over_turns_equals_transformers_at_once(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind)
    whole = Prompt().text(3).image(4, 6).text(6).text(12).text(2).image(2, 8).text(4)
    first, second, third = Prompt().text(3).image(4, 6).text(6), Prompt(), Prompt()
    cut, end = len(first.ids), len(first.ids) + 14
    second.ids, third.ids, third.images = whole.ids[cut:end], whole.ids[end:], whole.images[1:]
    model = load(path)
    cache = model.make_cache()
    features = ours(whole)["pixel_values"]
    found = [
        model(mx.array(first.input_ids), cache, pixel_values=features[:24], image_grid_thw=mx.array(first.images)),
        *(model(mx.array([[token]]), cache) for token in second.ids[:5]),
        model(mx.array([second.ids[5:]]), cache),
        model(mx.array(third.input_ids), cache, pixel_values=features[24:], image_grid_thw=mx.array(third.images)),
        model(mx.array([[7]]), cache),
    ]
    whole.ids.append(7)
    assert_close(mx.concatenate(found, axis=1), reference_logits(path, whole)[0])


def test_a_batch_of_mixed_prompts_padded_on_the_left_equals_transformers(checkpoint: Checkpoint) -> None:
    path, following = checkpoint("dense_vl"), [5, 9]
    prompts = [conversations()["several"], Prompt().text(9), conversations()["mixed"]]
    T = max(len(prompt.ids) for prompt in prompts)
    ids = np.array([[0] * (T - len(p.ids)) + p.ids + following for p in prompts])
    mask = np.array([[False] * (T - len(p.ids)) + [True] * (len(p.ids) + 2) for p in prompts])
    with torch.no_grad():
        expected = reference_model(path)(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask).long(), mm_token_type_ids=type_ids(ids),
            use_cache=False, **theirs(*prompts),
        ).logits.numpy()  # fmt: skip
    model = load(path)
    cache = model.make_cache()
    pieces = [model(mx.array(ids[:, :T]), cache, mask=mx.array(mask[:, :T]), **ours(*prompts))]
    pieces += [model(mx.array([[token]] * 3), cache) for token in following]
    found = np.concatenate([np.array(piece) for piece in pieces], axis=1)
    for row in range(3):
        assert_close(found[row, mask[row]], expected[row, mask[row]])


def test_greedy_tokens_after_an_image_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    path, prompt = checkpoint("dense_vl"), conversations()["wide"]
    ids = prompt.input_ids
    with torch.no_grad():
        expected = reference_model(path).generate(  # type: ignore[operator]
            torch.tensor(ids), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0,
            mm_token_type_ids=type_ids(ids), **theirs(prompt),
        )[0, ids.shape[1] :]  # fmt: skip
    model = load(path)
    cache, written = model.make_cache(), []
    logits = model(mx.array(ids), cache, **ours(prompt))
    for _ in range(16):
        written.append(int(mx.argmax(logits[0, -1]).item()))
        logits = model(mx.array([[written[-1]]]), cache)
    assert written == expected.tolist()


def test_text_alone_leaves_no_delta(checkpoint: Checkpoint) -> None:
    model = load(checkpoint("dense_vl"))
    cache = model.make_cache()
    model(mx.array(Prompt().text(5).input_ids), cache)
    assert cache.rope_delta is None


def test_images_for_a_checkpoint_without_a_tower_are_refused(checkpoint: Checkpoint) -> None:
    prompt = conversations()["one_image"]
    with pytest.raises(PromptError, match="no vision tower"):
        load(checkpoint("dense"))(mx.array(prompt.input_ids), **ours(prompt))


@pytest.mark.parametrize(
    ("ids", "media", "message"),
    [
        (Prompt().text(4), {}, "0 image placeholders, but the images given need 6"),
        (Prompt().text(4).image(4, 4), {}, "4 image placeholders, but the images given need 6"),
        (Prompt().image(4, 6), {"image_grid_thw": mx.array([[1, 6, 6]])}, "24 patches, but the grids ask for 36"),
        (Prompt().image(4, 6), {"image_grid_thw": mx.array([[1, 3, 8]])}, "multiples of 2"),
        (Prompt().image(4, 6), {"image_grid_thw": None}, "belong together"),
    ],
)
def test_pixels_that_do_not_match_the_prompt_are_refused(
    checkpoint: Checkpoint, ids: Prompt, media: dict[str, mx.array | None], message: str
) -> None:
    given = {**ours(Prompt().image(4, 6)), **media}
    with pytest.raises(PromptError, match=message):
        load(checkpoint("dense_vl"))(mx.array(ids.input_ids), **given)  # type: ignore[arg-type]
