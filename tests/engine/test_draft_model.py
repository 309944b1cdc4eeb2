"""A draft model never changes an answer, whatever it remembers and whoever shares the batch."""

from collections.abc import Callable
from collections.abc import Sequence as Listed
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.lookup import Lookup
from mlx_qwen.engine.prefix import PrefixIndex, prefix_key
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.errors import PromptError
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import DRAWN, GREEDY, PENALIZED, prompt, sequence, tokens, written
from tests.support.checkpoints import tiny_checkpoint
from tests.support.tokenizers import add_tokenizer
from tools.benchmarks.stepping import computed

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    path = checkpoint("dense", with_mtp=True)
    return load_model(path, ModelConfig.from_directory(path))


@pytest.fixture(scope="module")
def double(checkpoint: Checkpoint) -> Model:
    """The same model once more, without its MTP layer."""
    path = checkpoint("dense", with_mtp=True)
    config = ModelConfig.from_directory(path)
    loaded = load_model(path, config)
    loaded.mtp = None
    return loaded


@pytest.fixture(scope="module")
def blurred(checkpoint: Checkpoint) -> Model:
    """The same model with noise in its head: it guesses right now and then."""
    path = checkpoint("dense", with_mtp=True)
    loaded = load_model(path, ModelConfig.from_directory(path))
    assert loaded.lm_head is not None
    head = loaded.lm_head.weight
    noise = mx.random.normal(head.shape, key=mx.random.key(3))
    loaded.lm_head.weight = head + 0.25 * noise * mx.std(head)
    mx.eval(loaded.parameters())
    return loaded


def drafting(model: Model) -> DraftModel:
    return DraftModel(model, PrefixIndex(1 << 24))


def drafted(
    model: Model,
    drafter: DraftModel,
    ids: Listed[int],
    depth: int | None = 3,
    how: SamplingParameters = GREEDY,
    *,
    keep: bool = False,
    **options: object,
) -> Sequence:
    one = sequence(model, ids, depth, how, **options)  # type: ignore[arg-type]
    one.draft_model = drafter
    if keep:
        one.key, one.anchors, one.answer_from = prefix_key(list(ids)), [len(ids)], len(ids)
    return one


@pytest.mark.parametrize("how", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
@pytest.mark.parametrize("depth", [1, 4, 7, None], ids=str)
def test_the_answer_is_the_one_without_drafts(
    model: Model, blurred: Model, how: SamplingParameters, depth: int | None
) -> None:
    engine = Engine(model)
    one = drafted(model, drafting(blurred), prompt(1), depth, how, count=40)
    plain, found = written(engine, sequence(model, prompt(1), 0, how, count=40), one)
    assert tokens(found) == tokens(plain)
    assert any(emission.from_draft for emission in found)
    assert not all(share == 1 for share in one.drafts.acceptance())


@pytest.mark.parametrize("how", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
def test_a_model_guesses_for_itself_without_a_fault(model: Model, double: Model, how: SamplingParameters) -> None:
    one = drafted(model, drafting(double), prompt(2), 3, how, count=42)
    (found,) = written(Engine(model), one)
    assert one.drafts.acceptance() == [1.0, 1.0, 1.0]
    assert sum(not emission.from_draft for emission in found) <= 42 / 4 + 3


def test_its_state_after_partial_acceptance_is_that_of_a_fresh_prompt(model: Model, blurred: Model) -> None:
    drafter, engine = drafting(blurred), Engine(model)
    several = [
        drafted(model, drafter, prompt(seed, 10 + seed), depth, count=30) for seed, depth in enumerate((2, 5, 3))
    ]
    written(engine, *several)
    for one in several:
        state = one.draft_state
        assert state is not None and state.offset >= one.length - 8
        computed(lambda state=state: mx.eval(state.arrays()))
        fresh = blurred.step(mx.array([one.text(0, state.offset)]), blurred.make_cache().state).state
        for ours, theirs in zip(state.linear, fresh.linear, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert np.abs(np.array(a) - np.array(b)).max() <= 1e-5 * np.abs(np.array(b)).max()


def test_after_a_prefix_hit_it_knows_what_it_would_have_read(model: Model, double: Model) -> None:
    engine, drafter = Engine(model, prefixes=PrefixIndex(1 << 24)), drafting(double)
    first = drafted(model, drafter, prompt(1, 40), keep=True, count=20)
    written(engine, first)
    read: list[int] = []
    step = double.step

    def counting(input_ids: mx.array, *given: object, **named: object) -> object:
        read.append(input_ids.shape[1])
        return step(input_ids, *given, **named)  # type: ignore[arg-type]

    for ids in ([*prompt(1, 40), *prompt(5, 6)], [*first.ids, *first.written, *prompt(6, 4)]):
        (plain,) = written(Engine(model), sequence(model, ids, 0, count=20))
        again = drafted(model, drafter, ids, keep=True, count=20)
        read.clear()
        double.step = counting  # type: ignore[method-assign,assignment]
        (found,) = written(engine, again)
        del double.step
        assert again.cached >= 40
        assert tokens(found) == tokens(plain)
        assert again.drafts.acceptance() == [1.0, 1.0, 1.0]
        assert sum(read) <= len(ids) - 40 + 24


def test_rows_with_other_drafters_and_none_share_a_batch(model: Model, double: Model, blurred: Model) -> None:
    engine, wanted = Engine(model), [(1, GREEDY), (2, DRAWN), (3, PENALIZED), (4, GREEDY), (5, DRAWN)]
    plain = [sequence(model, prompt(seed, 7 * seed), 0, how, count=40) for seed, how in wanted]
    alone = [tokens(written(engine, one)[0]) for one in plain]
    one, other = drafting(double), drafting(blurred)
    rows = [
        drafted(model, one, prompt(1, 7), 5, GREEDY, count=40),
        drafted(model, other, prompt(2, 14), None, DRAWN, count=40),
        sequence(model, prompt(3, 21), 2, PENALIZED, count=40),
        sequence(model, prompt(4, 28), 0, GREEDY, count=40),
        drafted(model, other, prompt(5, 35), 3, DRAWN, count=40),
    ]
    rows[3].lookup = Lookup(type(rows[3].drafts)(None))
    found = written(engine, *rows)
    assert [tokens(each) for each in found] == alone
    assert rows[0].drafts.acceptance() == [1.0] * 5


def test_rules_and_functions_of_the_callers_own_hold(model: Model, double: Model) -> None:
    def answer(drafter: DraftModel | None) -> tuple[list[int], list[list[int]]]:
        seen: list[list[int]] = []

        def recording(history: mx.array, logits: mx.array) -> mx.array:
            seen.append(history.tolist())
            return logits

        budget = Thinking(5, thinking=(1, 2), closing=[9, 2, 9], inside=True)
        one = sequence(model, prompt(1), 4, rules=Rules([budget]), logits_processors=[recording], count=20)
        one.draft_model = drafter
        if drafter is None:
            one.drafts.fixed = 0
        return tokens(written(Engine(model), one)[0]), seen[:20]

    assert answer(drafting(double)) == answer(None)


def test_a_context_that_is_full_for_it_is_answered_without_it(model: Model, double: Model) -> None:
    drafter = drafting(double)
    drafter._most_tokens = 30
    one = drafted(model, drafter, prompt(1, 20), 4, count=30)
    plain, found = written(Engine(model), sequence(model, prompt(1, 20), 0, count=30), one)
    assert tokens(found) == tokens(plain)
    assert any(emission.from_draft for emission in found[:10])
    assert not any(emission.from_draft for emission in found[12:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("draft"), "dense", layers=4, seed=5))


def test_by_path_it_is_loaded_once_and_told_of_in_the_last_response(folder: Path, chat_folder: Path) -> None:
    model, processor = mlx_qwen.load(chat_folder)
    options = {"max_tokens": 24, "temperature": 0.0}
    plain = list(mlx_qwen.stream_generate(model, processor, [5, 6, 7], mtp=0, **options))
    for name in (chat_folder, str(folder)):
        found = list(
            mlx_qwen.stream_generate(model, processor, [5, 6, 7], draft_model=name, num_draft_tokens=3, **options)
        )
        assert [one.token for one in found] == [one.token for one in plain]
        assert all(one.drafting is None for one in found[:-1])
        drafting = found[-1].drafting
        assert drafting is not None
        passes = sum(not one.from_draft for one in found)
        assert drafting.tokens_per_pass == pytest.approx(len(found) / passes)
        assert 0 < len(drafting.acceptance) <= 3
        assert "tokens a pass, accepted by depth" in found[-1].statistics()
        kept = model.engine.draft_model  # type: ignore[union-attr,attr-defined]
        mlx_qwen.generate(model, processor, [5, 6], draft_model=name, **options)
        assert model.engine.draft_model is kept  # type: ignore[union-attr,attr-defined]
    assert plain[-1].drafting is None
    assert len(plain[-1].statistics().splitlines()) == 3


def test_a_prompt_cache_and_several_prompts_go_with_it(chat_folder: Path, folder: Path) -> None:
    model, processor = mlx_qwen.load(chat_folder)
    draft, _ = mlx_qwen.load(folder)
    options = {"max_tokens": 12, "temperature": 0.0}
    caches = [model.make_cache(), model.make_cache()]
    for ids in ([5, 6, 7], [8, 9]):
        plain = mlx_qwen.generate(model, processor, ids, prompt_cache=caches[0], mtp=0, **options)
        assert mlx_qwen.generate(model, processor, ids, prompt_cache=caches[1], draft_model=draft, **options) == plain
    prompts = [[5, 6], [7, 8, 9], [10]]
    plain = mlx_qwen.batch_generate(model, processor, prompts, mtp=0, **options)
    assert mlx_qwen.batch_generate(model, processor, prompts, draft_model=draft, **options) == plain


def test_a_model_of_another_vocabulary_is_refused_by_name(chat_folder: Path, folder: Path, tmp_path: Path) -> None:
    model, processor = mlx_qwen.load(chat_folder)
    with pytest.raises(PromptError, match=r"draft_model '.*' has .*vocabulary.*token \d+ is .*, expected"):
        mlx_qwen.generate(model, processor, "hi", draft_model=demo_folder())
    demo, _ = mlx_qwen.load()
    size, expected = demo.config.text.vocab_size, model.config.text.vocab_size
    with pytest.raises(PromptError, match=rf"has a vocabulary of {size:,} tokens, expected the model's {expected:,}"):
        mlx_qwen.generate(model, processor, "hi", draft_model=demo)
    with pytest.raises(PromptError, match=r"^draft_model is \d+; expected a path or repository"):
        mlx_qwen.generate(model, processor, "hi", draft_model=7)
