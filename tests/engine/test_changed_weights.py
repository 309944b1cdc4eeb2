"""Weights that a program changes between answers, by whatever assignment: the next has nothing of the old ones."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.engine.conftest import make_processor
from tests.engine.sequences import prompt

Checkpoint = Callable[..., Path]
PROMPT = prompt(1, 30)


class Adapted(nn.Module):
    """A linear layer with something added, as a LoRA adapter is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.added = mx.random.normal(layer.weight.shape, key=mx.random.key(3)) * 0.3

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x) + x @ self.added.T.astype(x.dtype)


def turned(weight: mx.array) -> mx.array:
    return weight * mx.linspace(-1, 1, weight.shape[-1]).astype(weight.dtype)


def update(model: Model) -> None:
    model.update({"layers": [{"input_layernorm": {"weight": turned(model.layers[0].input_layernorm.weight)}}]})


def update_layers(model: Model) -> None:
    for layer in model.layers:
        layer.update({"input_layernorm": {"weight": turned(layer.input_layernorm.weight)}})


def assign(model: Model) -> None:
    weights = [turned(layer.post_attention_layernorm.weight) for layer in model.layers]
    # Answers may be in the making, in another thread.
    mx.eval(weights)
    for layer, weight in zip(model.layers, weights, strict=True):
        layer.post_attention_layernorm.weight = weight


def adapt(model: Model) -> None:
    for layer in model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)


def adapt_modules(model: Model) -> None:
    for layer in model.layers:
        layer.mlp.update_modules({"down_proj": Adapted(layer.mlp.down_proj)})


def quantize(model: Model) -> None:
    nn.quantize(model, group_size=32, bits=2, class_predicate=lambda path, _: path.endswith("down_proj"))


def head(model: Model) -> None:
    assert model.lm_head is not None
    model.lm_head.weight = turned(model.lm_head.weight)


CHANGES = (update, update_layers, assign, adapt, adapt_modules, quantize, head)


@pytest.fixture
def fresh(checkpoint: Checkpoint) -> Callable[[], Model]:
    path = checkpoint("dense", with_mtp=True)
    return lambda: load_model(path, ModelConfig.from_directory(path))


def written(model: Model, **options: object) -> list[int]:
    stream = stream_generate(model, make_processor(), PROMPT, max_tokens=20, temperature=0, **options)  # type: ignore[arg-type]
    return [response.token for response in stream]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_next_answer_is_that_of_a_model_that_always_had_them(
    fresh: Callable[[], Model], change: Callable[[Model], None]
) -> None:
    model, always = fresh(), fresh()
    before = written(model, mtp=3)
    change(model)
    change(always)
    expected = written(always, mtp=0, prefix_cache=False)
    assert expected != before
    assert written(model, mtp=3) == expected
    # What the new weights left is gone on from again.
    last = list(stream_generate(model, make_processor(), PROMPT, max_tokens=2, temperature=0))[-1]
    assert last.cached_tokens == len(PROMPT)


def test_an_answer_that_was_half_written_leaves_nothing_for_others(fresh: Callable[[], Model]) -> None:
    model, always = fresh(), fresh()
    stream = stream_generate(model, make_processor(), PROMPT, max_tokens=60, temperature=0)
    next(stream)
    for each in (model, always):
        assign(each)
    assert written(model) == written(always, prefix_cache=False)
    list(stream)
    assert written(model) == written(always, prefix_cache=False)


def test_weights_that_are_of_no_file_any_more_are_no_files_on_the_disk(
    fresh: Callable[[], Model], tmp_path: Path
) -> None:
    model = fresh()
    assert model.identity
    adapt(model)
    with pytest.raises(PromptError, match="changed since"):
        generate(model, make_processor(), PROMPT, max_tokens=2, prefix_cache_dir=tmp_path)
    assert model.make_cache().identity == ""


def test_a_draft_models_weights_may_change_too(fresh: Callable[[], Model]) -> None:
    model, smaller = fresh(), fresh()
    expected = written(model, mtp=0, prefix_cache=False)
    for change in (lambda _: None, assign, quantize):
        change(smaller)
        assert written(model, draft_model=smaller, mtp=3) == expected
