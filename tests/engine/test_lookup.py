"""Prompt lookup copies what stood behind the same words, never changes an answer, and stops where it does not pay."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import mlx_qwen
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import tasks
from mlx_qwen.demo.prompts import question
from mlx_qwen.engine.depth import Drafts, stated_costs
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.lookup import GRAM, Lookup
from mlx_qwen.engine.prefix import PrefixIndex, prefix_key
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import DRAWN, GREEDY, PENALIZED, prompt, sequence, tokens, written


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Model:
    path = checkpoint(request.param)
    return load_model(path, ModelConfig.from_directory(path))


def lookup(fixed: int | None = None) -> Lookup:
    return Lookup(Drafts(fixed, stated_costs(draft=0)))


def copied(text: list[int], count: int) -> list[int]:
    """By going through the text backwards."""
    for end in range(len(text) - 1, GRAM - 1, -1):
        if text[end - GRAM : end] == text[-GRAM:]:
            grown = list(text)
            for place in range(end, end + count):
                grown.append(grown[place])
            return grown[len(text) :]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_guesses_are_what_stood_behind_the_last_same_words(seed: int) -> None:
    rng = random.Random(seed)
    text, known, found = [rng.randrange(3) for _ in range(200)], lookup(), 0
    for end in range(len(text) - 1):
        assert known.guess(7) == copied(text[:end], 7)
        found += bool(known.guess(1))
        known.saw(text[end : end + 1])
    assert found > 100


@pytest.mark.parametrize("how", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
def test_the_answer_is_the_one_without_it(model: Model, how: SamplingParameters) -> None:
    ids = prompt(1) * 3
    plain, looking, fixed = (sequence(model, ids, 0, how, count=50) for _ in range(3))
    looking.lookup, fixed.lookup = lookup(), lookup(5)
    found = [tokens(each) for each in written(Engine(model), plain, looking, fixed)]
    assert found[1:] == [found[0]] * 2


def test_what_is_repeated_is_written_in_few_passes(model: Model) -> None:
    """A prompt that ends as its answer begins: the answer is copied from the prompt, also behind a prefix hit."""
    engine, ids = Engine(model, prefixes=PrefixIndex(1 << 22)), prompt(2)
    answer = tokens(written(engine, sequence(model, ids, 0, count=60))[0])
    for _ in range(2):
        again = sequence(model, [*ids, *answer, *ids], 0, count=40)
        again.key, again.anchors, again.lookup = prefix_key(again.ids), [len(again.ids)], lookup(7)
        (found,) = written(engine, again)
        alone = sequence(model, again.ids, 0, count=40)
        assert tokens(found) == tokens(written(Engine(model), alone)[0])
        assert any(emission.from_draft for emission in found) or not set(tokens(found)) & set(answer)


def test_a_text_that_goes_on_otherwise_each_time_is_soon_left_alone() -> None:
    """The same three words again and again, each time followed by others."""
    rng, known, depths = random.Random(0), lookup(), []
    for _ in range(300):
        known.saw([1, 2, 3])
        assert known.guess(1) or not depths
        depth = known.drafts.depth(len(known.guess(7)))
        known.drafts.saw(depth, 0)
        depths.append(depth)
        known.saw([rng.randrange(10, 1000)])
    assert max(depths) > 0
    assert sum(depth > 0 for depth in depths[20:]) <= 10


def test_the_bundled_model_repeats_by_copying() -> None:
    model, processor = mlx_qwen.load()
    example = tasks.draw(tasks.TASKS["repeat"], random.Random(1), held_out=True)
    options = {"temperature": 0.0, "prefix_cache": False, "mtp": 0}

    def answer(**lookup: bool) -> list[mlx_qwen.GenerationResponse]:
        return list(mlx_qwen.stream_generate(model, processor, question(example), **options, **lookup))  # type: ignore[arg-type]

    plain, found = answer(), answer(prompt_lookup=True)
    assert [one.token for one in found] == [one.token for one in plain]
    assert found[-1].drafting is not None
    assert found[-1].drafting.tokens_per_pass > 1.3
