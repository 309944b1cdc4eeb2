"""Drafts that are chosen from a part of the vocabulary: the best of that part, and never another answer."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_qwen
from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import demo_folder
from mlx_qwen.engine.depth import DRAFT_COST
from mlx_qwen.engine.draft import Guesses, MTPDrafter
from mlx_qwen.engine.draft_model import DraftModel
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence
from mlx_qwen.engine.vocabulary import DraftVocabulary, special_run
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.partial_head import Part, PartialHead
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import DRAWN, GREEDY, PENALIZED, prompt, sequence, tokens, written

Checkpoint = Callable[..., Path]
V = 248_320
SPECIAL = (248_044, 248_077)
QWEN = DraftVocabulary(V, SPECIAL)
PARTS = {"low": Part(128, 300, 300), "two runs": Part(64, 250, 296), "nearly all": Part(192, 192, 297)}
OFTEN = SamplingParameters(
    temperature=0.8, top_p=0.9, min_p=0.01, frequency_penalty=0.4, xtc_probability=1.0, xtc_threshold=0.05
)
SAMPLINGS = {
    "greedy": GREEDY,
    "penalized": PENALIZED,
    "drawn": DRAWN,
    "untruncated": SamplingParameters(0.9),
    "xtc": OFTEN,
}


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Model:
    path = checkpoint(request.param, with_mtp=True)
    return load_model(path, ModelConfig.from_directory(path))


def chosen(part: Part) -> np.ndarray:
    return np.array([*range(part.low), *range(part.high, part.end)])


def limited(one: Sequence, low: int) -> Sequence:
    """The sequence with drafts from the first `low` tokens and the last ones that a tiny vocabulary has."""
    one.vocabulary = DraftVocabulary(320, (290, 299), low)
    return one


def heads() -> list[tuple[str, nn.Module]]:
    mx.random.seed(0)
    dense, tied = nn.Linear(128, 300, bias=False), nn.Embedding(300, 128)
    found: list[tuple[str, nn.Module]] = [("linear", dense), ("tied", tied)]
    for bits, group, mode in ((2, 32, "affine"), (3, 64, "affine"), (4, 64, "affine"), (8, 128, "affine"),
            (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")):  # fmt: skip
        packed = {"group_size": group, "bits": bits, "mode": mode}
        found += [(f"{mode} {bits}", nn.QuantizedLinear.from_linear(dense, **packed))]
        found += [(f"{mode} {bits} tied", nn.QuantizedEmbedding.from_embedding(tied, **packed))]
    return found


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("head", [pytest.param(head, id=name) for name, head in heads()])
def test_the_logits_of_a_part_are_those_of_all_tokens(head: nn.Module, part: Part) -> None:
    x = mx.random.normal((3, 1, 128), key=mx.random.key(1))
    whole = head.as_linear(x) if isinstance(head, nn.Embedding | nn.QuantizedEmbedding) else head(x)
    found = PartialHead(head)(x, part)  # type: ignore[arg-type]
    assert found.shape == (3, 1, part.size) and found.dtype == whole.dtype
    np.testing.assert_allclose(found, np.array(whole)[..., chosen(part)], rtol=1e-5, atol=1e-5)
    assert np.array_equal(part.of(whole), np.array(whole)[..., chosen(part)])
    assert np.array_equal(part.ids(mx.arange(part.size)), chosen(part))


def test_a_part_of_a_head_takes_no_memory() -> None:
    head = nn.QuantizedLinear(1024, 4096, bias=False, group_size=64, bits=4)
    mx.eval(head.parameters())
    partial, x = PartialHead(head), mx.ones((1, 1024))
    mx.eval(partial(x, Part(2048, 4000, 4096)))
    before, whole = mx.get_active_memory(), sum(array.nbytes for array in (head.weight, head.scales, head.biases))
    kept = [partial(x, Part(low, 4000, 4096)) for low in (512, 1024, 2048, 3072)]
    mx.eval(kept)
    assert mx.get_active_memory() - before < whole / 8


def test_changed_weights_are_those_of_the_next_draft(checkpoint: Checkpoint) -> None:
    path = checkpoint("dense", with_mtp=True)
    model, part = load_model(path, ModelConfig.from_directory(path)), PARTS["two runs"]
    hidden = mx.random.normal((1, 1, model.config.text.hidden_size))
    before = model.logits(hidden, part)
    assert np.array_equal(before, part.of(model.logits(hidden)))
    assert model.lm_head is not None
    model.lm_head.weight = 2 * model.lm_head.weight
    np.testing.assert_allclose(model.logits(hidden, part), 2 * before, rtol=1e-6)
    model.update({"lm_head": {"weight": 2 * model.lm_head.weight}})
    np.testing.assert_allclose(model.logits(hidden, part), 4 * before, rtol=1e-6)


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("parameters", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_guess_is_what_all_tokens_would_give_if_the_others_could_not_come(
    parameters: SamplingParameters, part: Part
) -> None:
    """The masked logits go through the whole vocabulary's way, whose noise belongs to token ids."""
    rng = np.random.default_rng(0)
    masked_out = np.full((1, 300), -np.inf, np.float32)
    masked_out[:, chosen(part)] = 0
    found, expected = [], []
    for seed in range(20):
        sampler = TokenSampler(
            parameters,
            prompt=mx.array(prompt(seed)),
            vocab_size=300,
            seed=seed,
            logit_bias={5: 3.0, 295: 2.0, 280: 4.0},
            spared_by_xtc=[3, 291],
        )
        history = sampler.start()
        for _ in range(8):
            logits = mx.array(rng.normal(0, 2, (1, 300)).astype(np.float32))
            found.append(sampler.draft(part.of(logits), history, part).item())
            expected.append(sampler.draft(logits + mx.array(masked_out), history).item())
            history = sampler.saw(history, mx.array([found[-1]], mx.uint32))
    assert found == expected
    assert len(set(found)) > 1


@pytest.mark.parametrize("parameters", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
@pytest.mark.parametrize("depth", [1, 4, None], ids=str)
def test_the_answer_is_the_one_without_drafts(model: Model, parameters: SamplingParameters, depth: int | None) -> None:
    part = limited(sequence(model, prompt(1), depth, parameters, count=40), 128)
    plain, drafted = written(Engine(model), sequence(model, prompt(1), 0, parameters, count=40), part)
    assert tokens(drafted) == tokens(plain)
    proposed = [emission.token for emission in drafted if emission.from_draft]
    assert all(token < 128 or token >= 290 for token in proposed)


def test_rows_of_a_batch_guess_from_parts_of_their_own(model: Model) -> None:
    wanted = [(1, GREEDY, 64), (2, DRAWN, 192), (3, PENALIZED, None), (4, GREEDY, 256)]

    def rows(depth: int) -> list[Sequence]:
        made = [(sequence(model, prompt(seed, 9 * seed), depth, how, count=30), low) for seed, how, low in wanted]
        return [one if low is None else limited(one, low) for one, low in made]

    engine = Engine(model)
    alone = [tokens(written(engine, one)[0]) for one in rows(0)]
    assert [tokens(each) for each in written(engine, *rows(3))] == alone


@pytest.mark.parametrize("lows", [(64, 192), (64, 64), (64, None)], ids=str)
def test_a_row_guesses_the_same_in_company(model: Model, lows: tuple[int | None, ...]) -> None:
    samplings = (GREEDY, DRAWN)
    made = [sequence(model, prompt(i), 1, how) for i, how in enumerate(samplings)]
    rows = [one if low is None else limited(one, low) for one, low in zip(made, lows, strict=True)]
    for row in rows:
        row.history = row.sampler.start()
    logits = mx.random.normal((2, model.config.text.vocab_size), key=mx.random.key(4))
    together = Guesses(rows, 0.5)
    found = together.take(logits if together.part is None else together.part.of(logits)).tolist()
    for i, row in enumerate(rows):
        alone = Guesses([row], 0.5)
        own = logits[i : i + 1]
        assert alone.take(own if alone.part is None else alone.part.of(own)).tolist() == [found[i]]


def test_a_draft_model_guesses_from_a_part_too(model: Model) -> None:
    drafter, double = DraftModel(model, PrefixIndex(1 << 20)), sequence(model, prompt(2), 3, DRAWN, count=40)
    double.draft_model = drafter
    (plain,) = written(Engine(model), sequence(model, prompt(2), 0, DRAWN, count=40))
    (found,) = written(Engine(model), limited(double, 192))
    assert tokens(found) == tokens(plain)
    taken = [emission.token for emission in found if emission.from_draft]
    assert taken and all(token < 192 or token >= 290 for token in taken)


def test_the_bundled_model_answers_alike_from_any_part() -> None:
    model, processor = mlx_qwen.load(demo_folder())
    question = "What is 12 + 30?"
    plain = mlx_qwen.generate(model, processor, question, temperature=0.0, mtp=0, max_tokens=40)
    for size in (0, 64, 400, None):
        last = list(
            mlx_qwen.stream_generate(
                model, processor, question, temperature=0.0, mtp=3, max_tokens=40, draft_vocabulary=size
            )
        )
        assert "".join(one.text for one in last) == plain
        assert last[-1].drafting is not None


# What the head takes of a guess's bytes: about that of 9B, and of 0.8B.
SHARES = (0.8, 0.92)


@pytest.mark.parametrize("share", SHARES)
def test_a_text_of_early_tokens_is_guessed_from_few_and_one_of_late_tokens_from_all(share: float) -> None:
    rng = np.random.default_rng(0)
    early = QWEN.part(rng.integers(0, 30_000, 256).tolist(), share)
    assert early is not None and early.low <= V // 8 + 64
    assert (early.high, early.end) == SPECIAL
    assert QWEN.part(rng.integers(200_000, 248_000, 256).tolist(), share) is None
    middle = QWEN.part(rng.integers(100_000, 130_000, 256).tolist(), share)
    assert middle is not None and 130_000 <= middle.low <= 160_000


def test_special_tokens_and_pictures_say_nothing_of_the_text() -> None:
    late = np.random.default_rng(0).integers(200_000, 248_000, 30).tolist()
    assert QWEN.part([248_056] * 200 + late, 0.9) is None


def test_the_part_is_the_one_that_gives_most_tokens_for_the_cost() -> None:
    """Against the definition, written out: expected tokens of two guesses over the cost of their pass."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        scale = 10 ** rng.uniform(3.5, 5.3)
        text = np.minimum(rng.exponential(scale, 256), 248_000).astype(int)
        rates = {}
        for eighth in range(1, 9):
            low = V if eighth == 8 else -(-(V * eighth // 8) // 64) * 64
            size = V if eighth == 8 else low + max(0, SPECIAL[1] - max(SPECIAL[0], low))
            chance = 0.8 if eighth == 8 else 0.8 * ((text < low).sum() + 2) / (256 + 2)
            cost = 1 + 2 * (0.3 + 0.15 * (1 - 0.8 + 0.8 * size / V))
            rates[low] = (1 + chance + chance**2) / cost
        part = QWEN.part(text.tolist(), 0.8)
        assert rates[V if part is None else part.low] == pytest.approx(max(rates.values()), rel=1e-12)


def test_a_small_vocabulary_is_whole_unless_a_number_is_given() -> None:
    assert DraftVocabulary(3000, (2900, 3000)).part([1, 2, 3], 0.9) is None
    assert DraftVocabulary(3000, (2900, 3000), 1000).part([2000] * 9, 0.9) == Part(1024, 2900, 3000)
    assert DraftVocabulary(3000, (2900, 3000), 2940).part([1], 0.9) == Part(2944, 2944, 3000)
    assert DraftVocabulary(3000, (2900, 3000), 5000).part([1], 0.9) is None


def test_a_guess_costs_what_is_read_for_it() -> None:
    assert QWEN.cost(None, 0.9) == DRAFT_COST
    assert QWEN.cost(Part(V // 2, V, V), 0.9) == pytest.approx(DRAFT_COST * (0.1 + 0.9 / 2))


def test_what_the_head_takes_counts_the_experts_that_are_asked(model: Model) -> None:
    text, drafter = model.config.text, MTPDrafter(model)
    assert model.lm_head is not None and model.mtp is not None
    head, read = model.lm_head.weight.nbytes, 0.0
    for name, array in tree_flatten(model.mtp.parameters()):
        asked = text.moe.num_experts_per_tok / text.moe.num_experts if text.moe and "switch_mlp" in name else 1
        read += asked * array.nbytes  # type: ignore[union-attr]
    assert drafter.head_share == pytest.approx(head / (head + read))


def test_special_tokens_are_the_run_at_the_end() -> None:
    assert special_run([248_044, 248_045, 248_046, 3]) == (248_044, 248_047)
    assert special_run([]) == (0, 0)
