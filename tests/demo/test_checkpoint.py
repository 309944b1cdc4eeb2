"""The bundled checkpoint: it loads without a name, answers what it never saw, and survives conversion."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen
from mlx_qwen.convert import convert
from mlx_qwen.demo import DEMO_FOLDER
from mlx_qwen.demo.prompts import question
from mlx_qwen.errors import CheckpointError
from mlx_qwen.model import Model
from tools.demo_training.engines import accepted_drafts, runtime, transformers_from
from tools.demo_training.grading import Engine, accuracy, answered, batches, held_out
from tools.export_demo import export

# Of 16 held-out questions of a task, so many are answered right at least. Everything about them is settled by seeds.
QUESTIONS = 16
RIGHT = {
    "arithmetic, reasoned": 14,
    "arithmetic, direct, 2 digits": 14,
    "recall, 4 to 30 facts": 10,
    "picture, reasoned": 15,
    "picture, direct": 15,
    "several pictures": 15,
    "frame sequence": 15,
    "tool call": 14,
    "tool response": 14,
    "tale": 14,
}


@pytest.fixture(scope="module")
def model() -> Model:
    return mlx_qwen.load()[0]


def tensors(folder: Path) -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= {f"{file.name}: {name}": value for name, value in loaded.items()}
    return found


def test_it_takes_no_more_than_six_megabytes() -> None:
    assert sum(file.stat().st_size for file in DEMO_FOLDER.iterdir()) <= 6_000_000


def test_it_has_every_part_of_the_architecture(model: Model) -> None:
    text = model.config.text
    assert text.layer_types == (("linear_attention",) * 3 + ("full_attention",)) * 2
    assert text.moe is not None
    assert model.vision is not None
    assert model.mtp is not None


def test_without_the_bundled_checkpoint_the_error_says_what_to_do(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mlx_qwen.demo.DEMO_FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match=r"demo checkpoint is missing .*Install mlx-qwen again, or name a model"):
        mlx_qwen.load()


@pytest.mark.parametrize("task", RIGHT)
def test_it_answers_questions_that_it_was_not_trained_on(model: Model, task: str) -> None:
    assert accuracy(runtime(model), held_out(task, QUESTIONS)) * QUESTIONS >= RIGHT[task]


def test_generating_writes_the_answers_that_grading_calls_right() -> None:
    model, processor = mlx_qwen.load()
    for task in ("arithmetic, direct, 2 digits", "picture, reasoned"):
        (batch,) = batches(held_out(task, 4))
        graded = answered(runtime(model), batch)
        for asked, right in zip(sorted(held_out(task, 4), key=lambda q: len(q.ids)), graded, strict=True):
            example = asked.example
            text = mlx_qwen.generate(
                model, processor, question(example), max_tokens=150, enable_thinking=example.thinking
            )
            expected = example.answer
            if example.thinking:
                expected = f"{example.messages[-1]['reasoning_content']}\n</think>\n\n{expected}"
            assert (text.strip() == expected.strip()) == right


@pytest.mark.parametrize(("bits", "lost"), [(8, 1), (4, 4)])
def test_fewer_bits_cost_few_answers(model: Model, tmp_path: Path, bits: int, lost: int) -> None:
    convert(DEMO_FOLDER, tmp_path / "packed", bits=bits, progress=False)
    # In fp32, as packed matrices take many times longer in bf16 on a CPU.
    packed = mlx_qwen.load(tmp_path / "packed", dtype=mx.float32)[0]
    for task in ("arithmetic, reasoned", "picture, reasoned"):
        questions = held_out(task, QUESTIONS)
        assert accuracy(runtime(packed), questions) >= accuracy(runtime(model), questions) - lost / QUESTIONS


def test_drafts_of_the_mtp_layer_are_mostly_what_the_model_takes(model: Model) -> None:
    counts = [accepted_drafts(model, batch) for batch in batches(held_out("arithmetic, reasoned", 8))]
    assert sum(right for right, _ in counts) > 0.6 * sum(total for _, total in counts)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face folder rebuilt from the bundled checkpoint."""
    folder = tmp_path_factory.mktemp("published")
    export(DEMO_FOLDER, folder)
    return folder


def test_converting_the_published_form_gives_the_bundled_weights_to_the_last_bit(published: Path, tmp_path) -> None:
    convert(published, tmp_path / "again", quantize=False, progress=False)
    bundled, again = tensors(DEMO_FOLDER), tensors(tmp_path / "again")
    assert bundled.keys() == again.keys()
    assert all(value.dtype == again[name].dtype for name, value in bundled.items())
    assert all(mx.array_equal(value, again[name]).item() for name, value in bundled.items())


@pytest.fixture(scope="module")
def reference(published: Path) -> Engine:
    return transformers_from(published)


@pytest.mark.parametrize("task", ["arithmetic, reasoned", "several pictures", "frame sequence", "tool call"])
def test_its_logits_are_those_of_transformers(reference: Engine, task: str) -> None:
    batch = next(batches(held_out(task, 2)))
    found, expected = runtime(mlx_qwen.load(dtype=mx.float32)[0])(batch), reference(batch)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).all()
