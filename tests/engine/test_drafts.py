"""Drafts never change an answer: the same tokens come, in fewer passes."""

from collections.abc import Callable
from collections.abc import Sequence as Listed
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine.depth import MOST_DRAFTS, Drafts
from mlx_qwen.engine.draft import Guesses
from mlx_qwen.engine.emission import Endless
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.guessing import Guessing, Plan
from mlx_qwen.engine.rules import Rules
from mlx_qwen.engine.sampling import TokenSampler
from mlx_qwen.engine.sequence import Sequence, Unread
from mlx_qwen.engine.step import Batch
from mlx_qwen.engine.thinking import Thinking
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.state import State
from mlx_qwen.recommended import SamplingParameters
from tests.engine.sequences import DRAWN, GREEDY, PENALIZED, prompt, sequence, tokens, written
from tools.benchmarks.stepping import computed, drained

Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Model:
    path = checkpoint(request.param, with_mtp=True)
    return load_model(path, ModelConfig.from_directory(path))


@pytest.mark.parametrize("parameters", [GREEDY, PENALIZED, DRAWN], ids=["greedy", "penalized", "drawn"])
@pytest.mark.parametrize("depth", [1, 3, MOST_DRAFTS, None], ids=str)
def test_the_answer_is_the_one_without_drafts(model: Model, parameters: SamplingParameters, depth: int | None) -> None:
    engine = Engine(model)
    plain, drafted = written(
        engine, sequence(model, prompt(1), 0, parameters), sequence(model, prompt(1), depth, parameters)
    )
    assert tokens(drafted) == tokens(plain)
    assert not any(emission.from_draft for emission in plain)


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_packed_keys_and_values_are_guessed_over_as_unpacked_ones_are(model: Model, kv_bits: int) -> None:
    rows = [sequence(model, prompt(seed, 30), depth, how) for seed, depth, how in ((1, 0, GREEDY), (2, 0, DRAWN),
            (1, 3, GREEDY), (2, MOST_DRAFTS, DRAWN))]  # fmt: skip
    for row in rows:
        row.kv_bits = kv_bits
    found = [tokens(each) for each in written(Engine(model), *rows)]
    assert found[2:] == found[:2]
    assert all(row.state is not None and row.state.kind.packing is not None for row in rows)


def test_the_rows_of_a_batch_keep_their_own_numbers_of_drafts(model: Model) -> None:
    engine, wanted = Engine(model), [(1, 0, GREEDY), (2, 3, GREEDY), (3, 7, DRAWN), (4, None, PENALIZED)]
    alone = [tokens(written(engine, sequence(model, prompt(seed, 9 * seed), 0, how))[0]) for seed, _, how in wanted]
    together = written(engine, *(sequence(model, prompt(seed, 9 * seed), depth, how) for seed, depth, how in wanted))
    assert [tokens(each) for each in together] == alone


def test_functions_of_the_callers_own_see_every_token_once_and_in_order(model: Model) -> None:
    def answer(depth: int) -> tuple[list[int], list[list[int]]]:
        histories: list[list[int]] = []

        def recording(history: mx.array, logits: mx.array) -> mx.array:
            histories.append(history.tolist())
            return logits

        engine = Engine(model)
        (emissions,) = written(engine, sequence(model, prompt(1), depth, logits_processors=[recording], count=20))
        return tokens(emissions), histories[:20]

    assert answer(4) == answer(0)


def test_a_budget_holds_for_verified_rows(model: Model) -> None:
    def answer(depth: int) -> list[int]:
        budget = Thinking(5, thinking=(1, 2), closing=[9, 2, 9], inside=True)
        engine = Engine(model)
        return tokens(written(engine, sequence(model, prompt(1), depth, rules=Rules([budget])))[0])

    assert answer(4) == answer(0)
    assert answer(4)[5:8] == [9, 2, 9]


class Oracle:
    """Guesses what it was told the answer will be, and every `wrong_at`-th token wrong."""

    def __init__(self, answer: Listed[int], start: int, wrong_at: int) -> None:
        self.answer, self.start, self.wrong_at = [*answer, *([0] * 10)], start, wrong_at

    name = "oracle"

    def room(self, state: State, row: Sequence) -> int:
        return MOST_DRAFTS

    def kept(self, rows: object, right: object) -> None:
        pass

    def propose(self, unread: Unread, serving: object, depth: int) -> mx.array:
        at = unread.state.offset - self.start + 1
        guesses = [
            self.answer[at + i] if (at + i) % self.wrong_at else (self.answer[at + i] + 1) % 299 for i in range(depth)
        ]
        return mx.array([guesses])


@pytest.mark.parametrize("wrong_at", [2, 5, 1000])
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_right_guesses_are_taken_and_wrong_ones_are_not(model: Model, depth: int, wrong_at: int) -> None:
    engine, ids = Engine(model), prompt(1)
    expected = tokens(written(engine, sequence(model, ids, 0))[0])
    engine._guessers.mtp = Oracle(expected, len(ids), wrong_at)
    drafted = sequence(model, ids, depth)
    (emissions,) = written(engine, drafted)
    assert tokens(emissions) == expected
    taken = [i for i, emission in enumerate(emissions) if emission.from_draft]
    assert taken
    assert not any(i % wrong_at == 0 for i in taken if i)
    if wrong_at == 1000:
        assert drafted.drafts.acceptance() == [1.0] * depth
        assert len(taken) >= len(expected) * depth / (depth + 1) - depth - 1


def test_after_a_partial_acceptance_the_state_is_that_of_a_fresh_prompt(model: Model) -> None:
    engine, ids = Engine(model), prompt(1)
    expected = tokens(written(engine, sequence(model, ids, 0))[0])
    engine._guessers.mtp = Oracle(expected, len(ids), 3)
    drafted, cache = sequence(model, ids, 5, count=30), model.make_cache()
    drafted.prompt_cache = cache
    written(engine, drafted)
    read = cache.offset - len(ids)
    assert cache.tokens[: cache.offset] == [*ids, *expected[:read]]
    fresh = model.step(mx.array([[*ids, *expected[:read]]]), model.make_cache().state).state
    for ours, theirs in zip(cache.state.linear, fresh.linear, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert np.abs(np.array(a) - np.array(b)).max() <= 1e-5 * np.abs(np.array(b)).max()


def test_what_drafts_would_need_is_not_left_to_the_end_of_an_answer_without_any(model: Model, tmp_path: Path) -> None:
    engine, one = Engine(model), sequence(model, prompt(1), 0, count=400)

    def waiting() -> int:
        assert one.state is not None
        mx.export_to_dot(str(tmp_path / "graph.dot"), *one.state.mtp[0].buffers())
        return len((tmp_path / "graph.dot").read_text())

    def grown() -> list[int]:
        engine.submit(one)
        sizes = []
        while len(one.written) < 120:
            engine.step()
            drained(one)
            sizes.append(waiting())
        return sizes

    sizes = computed(grown)
    assert max(sizes[80:]) <= 1.2 * max(sizes[:40])


def test_drafts_that_are_always_wrong_are_given_up_and_tried_again_now_and_then() -> None:
    drafts, depths = Drafts(None), []
    for _ in range(400):
        depths.append(drafts.depth(7))
        drafts.saw(depths[-1], 0)
    assert depths[0] > 0
    assert sum(depth > 0 for depth in depths[20:]) <= 10
    assert any(depths[100:])


def test_drafts_that_are_always_right_go_as_deep_as_they_may() -> None:
    drafts, depths = Drafts(None), []
    for _ in range(60):
        depths.append(drafts.depth(7))
        drafts.saw(depths[-1], depths[-1])
    assert depths[-1] == MOST_DRAFTS
    assert drafts.depth(2) == 2
    assert drafts.depth(0) == 0


def test_drawn_tokens_come_as_often_as_their_probabilities_say() -> None:
    """Draws from a distribution that is known, with guesses from another one, against the known one's chi-square."""
    size, count = 8, 20_000
    logits = np.random.default_rng(0).normal(0, 1.2, size).astype(np.float32)
    guessed = logits + np.random.default_rng(1).normal(0, 0.7, size).astype(np.float32)
    counts, taken = np.zeros(size), 0
    per_seed = 500
    for seed in range(count // per_seed):
        sampler = TokenSampler(SamplingParameters(temperature=0.9), prompt=mx.array([0]), vocab_size=size, seed=seed)
        history, drawn, guesses = sampler.start(), [], []
        for _ in range(per_seed):
            guesses.append(sampler.draft(mx.array(guessed[None]), history))
            drawn.append(sampler.choose(mx.array(logits[None]), history).token)
            history = history._replace(written=history.written + 1)
        found = np.array(mx.concatenate(drawn))
        taken += int((found == np.array(mx.concatenate(guesses))).sum())
        counts += np.bincount(found, minlength=size)
    probabilities = np.exp(logits / 0.9) / np.exp(logits / 0.9).sum()
    statistic = float(((counts - count * probabilities) ** 2 / (count * probabilities)).sum())
    assert statistic < 24.3  # chi-square of 7 degrees of freedom exceeds it once in 1,000
    apart = 0.5 * np.abs(probabilities - np.exp(guessed / 0.9) / np.exp(guessed / 0.9).sum()).sum()
    assert taken / count >= (1 - apart) / (1 + apart) - 0.02


class Chain:
    """A model whose next token depends on the last one alone, by a table of logits: what it writes is known."""

    def __init__(self, table: np.ndarray) -> None:
        self.table = mx.array(table.astype(np.float32))

    def step(self, ids: mx.array, state: object, *, tape: bool = False) -> tuple[mx.array, object, "Chain"]:
        return self.table[ids], state, self

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden

    def keep(self, kept: object) -> object:
        return State(())

    name = "chain"

    def propose(self, unread: Unread, serving: object, depth: int) -> mx.array:
        guesses, tokens = Guesses(unread.rows), unread.tokens
        for _ in range(depth):
            tokens = guesses.take(self.table[tokens])
        return guesses.made()

    def kept(self, rows: object, right: object) -> None:
        pass


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_verified_tokens_come_as_often_behind_each_other_as_their_probabilities_say(depth: int) -> None:
    """20,000 draws of a chain of 5 tokens, with guesses from another one, against the chain's own chi-square."""
    size, count, temperature, together = 5, 20_000, 0.9, 20
    table = np.random.default_rng(depth).normal(0, 1.0, (size, size))
    model, guesser = Chain(table), Chain(table + np.random.default_rng(9).normal(0, 0.8, (size, size)))
    drafts, rows = Drafts(depth), []
    for seed in range(together):
        sampler = TokenSampler(
            SamplingParameters(temperature=temperature), prompt=mx.array([0]), vocab_size=size, seed=100 * depth + seed
        )
        state = State((), last=mx.zeros((1, 1)))
        row = Sequence([0], sampler, Rules(), Endless(), 1 << 20, drafts, state=state, history=sampler.start())
        row.pending = sampler.choose(model.table[mx.array([0])], row.history)
        rows.append(row)
    batch = Batch(model, rows)  # type: ignore[arg-type]
    while any(len(row.written) < count // together for row in rows):
        batch.verify(Guessing(batch.rows, [Plan(depth, drafts, guesser)] * together))  # type: ignore[arg-type]
    pairs = np.zeros((size, size))
    for row in rows:
        written = row.written[: count // together]
        np.add.at(pairs, (written[:-1], written[1:]), 1)
    likely = np.exp(table / temperature)
    expected = likely / likely.sum(axis=1, keepdims=True) * pairs.sum(axis=1, keepdims=True)
    statistic = float(((pairs - expected) ** 2 / expected).sum())
    assert statistic < 45.3  # chi-square of 20 degrees of freedom exceeds it once in 1,000
    assert all(0.4 < share < 0.95 for share in drafts.acceptance())
    assert len(drafts.acceptance()) == depth
