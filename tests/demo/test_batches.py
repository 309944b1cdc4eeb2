"""What the demo is trained on is what this runtime and transformers make of the same conversations."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from mlx_qwen.demo.prompts import question
from mlx_qwen.demo.tasks import TASKS
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from tools.demo_training.architecture import VOCAB_SIZE
from tools.demo_training.batches import IGNORED, KINDS, PARTS, batch, encoded
from tools.demo_training.pixels import clip_pixels, patches, scene_patches
from tools.demo_training.tokenizer import SPECIAL, TAGS, demo_tokenizer, train_tokenizer

IMAGE, VIDEO = (demo_tokenizer().token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video"))


def test_training_a_tokenizer_twice_gives_the_same() -> None:
    first, second = (train_tokenizer(examples=60) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == demo_tokenizer().get_vocab_size() == VOCAB_SIZE


def test_every_byte_and_every_special_token_is_known() -> None:
    text = "Grüße, 你好 🙂<|im_end|><think>"
    ids = demo_tokenizer().encode(text, add_special_tokens=False).ids
    assert demo_tokenizer().decode(ids, skip_special_tokens=False) == text
    assert all(demo_tokenizer().token_to_id(token) is not None for token in (*SPECIAL, *TAGS))


def test_digits_are_tokens_of_their_own() -> None:
    assert demo_tokenizer().encode("358+67=425").tokens == list("358+67=425")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_depends_on_kind_seed_and_index_alone(kind: str) -> None:
    first, again, other = batch(kind, 3, 5), batch(kind, 3, 5), batch(kind, 3, 6)
    assert all((first[name] == again[name]).all() for name in first)
    assert {name: array.shape for name, array in first.items()} == {name: array.shape for name, array in other.items()}
    assert (first["input_ids"] != other["input_ids"]).any()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].media])
def test_every_part_of_a_batch_holds_pictures_of_the_same_sizes(kind: str) -> None:
    arrays = batch(kind, 0, 0)
    tokens = np.isin(arrays["input_ids"], (IMAGE, VIDEO)).sum(1)
    assert all((tokens[part::PARTS] == tokens[::PARTS]).all() for part in range(PARTS))
    assert 4 * tokens.sum() == len(arrays["pixel_values"]) == arrays["grid_thw"].prod(1).sum()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_what_is_learnt_are_the_answers_and_their_ends(task: str) -> None:
    for seed in range(10):
        example = TASKS[task](random.Random(seed))
        found = encoded(example)
        learnt = demo_tokenizer().decode(found.ids[found.learnt].tolist(), skip_special_tokens=False)
        if not example.messages:
            assert learnt == example.text + "<|endoftext|>"
            continue
        answers = learnt.split("<|im_end|>")[:-1]
        said = [str(m["content"]) for m in example.messages if m["role"] == "assistant"]
        assert len(answers) == len(said)
        assert all(words in answer for words, answer in zip(said, answers, strict=True))
        assert answers[-1].split("</think>\n\n")[-1] == example.answer


def test_labels_are_tokens_of_their_own_places() -> None:
    arrays = batch("tools", 0, 0)
    learnt = arrays["labels"] != IGNORED
    assert (arrays["labels"][learnt] == arrays["input_ids"][learnt]).all()
    assert 0.1 < learnt.mean() < 0.5


@pytest.mark.parametrize("task", ["arithmetic_reasoned", "tool_answer", "tool_turns", "picture", "pictures", "clip"])
def test_a_prompt_gives_the_ids_and_patches_that_were_trained_on(processor: Processor, task: str) -> None:
    for seed in range(6):
        example = TASKS[task](random.Random(seed))
        options = GenerationOptions(enable_thinking=example.thinking, tools=list(example.tools) or None)
        inputs = prompt_inputs(processor, question(example), options)
        trained = encoded(example).ids
        assert inputs.ids == trained[: len(inputs.ids)].tolist()
        rest = processor.decode(trained[len(inputs.ids) :].tolist())
        assert rest.endswith(example.answer + "<|im_end|>\n")
        expected = [scene_patches(scene, 4) for scene in example.pictures]
        expected += [patches(clip_pixels(clip, 4)) for clip in example.clips]
        assert len(inputs.media) == len(expected)
        for one, pixels in zip(inputs.media, expected, strict=True):
            assert (np.array(one.patches.pixel_values) == pixels).all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].media])
def test_positions_are_those_of_transformers(kind: str) -> None:
    import torch
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeModel

    arrays = batch(kind, 1, 0)
    vision = SimpleNamespace(spatial_merge_size=2)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.get_vision_position_ids = lambda *given, **named: Qwen3_5MoeModel.get_vision_position_ids(
        model, *given, **named
    )
    ids = arrays["input_ids"]
    types = torch.from_numpy(np.isin(ids, (IMAGE, VIDEO)).astype(np.int64))
    real = torch.from_numpy((np.arange(ids.shape[1]) < arrays["lengths"][:, None]).astype(np.int64))
    expected, _ = Qwen3_5MoeModel.get_rope_index(
        model, torch.from_numpy(ids), types, torch.from_numpy(arrays["grid_thw"]), None, real
    )
    found = torch.from_numpy(arrays["position_ids"])
    assert (found == expected)[:, real.bool()].all()
