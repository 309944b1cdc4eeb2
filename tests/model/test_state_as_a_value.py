"""A state is a value: going on from it, forking, joining and taking back leave every state that is held as it was."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.mlp import MLP
from mlx_qwen.model.state import State, empty_state

Checkpoint = Callable[..., Path]
KINDS = ["dense", "moe", "next"]
TOLERANCE = 2e-4


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> Model:
    return load(checkpoint("dense", with_mtp=True))


def tokens(count: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(0, 299, (1, count)))


def read(model: Model, ids: mx.array, *, kv_bits: int | None = None) -> State:
    state = empty_state(model.config.text, kv_packing(model.config.text, kv_bits), mtp=model.mtp is not None)
    return model.step(ids, state).state


def next_logits(model: Model, state: State, ids: mx.array) -> np.ndarray:
    return np.array(model.logits(model.step(ids, state).hidden))


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_going_on_from_a_state_leaves_it_as_it_was(model: Model) -> None:
    state = read(model, tokens(20))
    before = next_logits(model, state, tokens(3, seed=1))
    longer = model.step(tokens(30, seed=2), state).state
    assert np.array_equal(next_logits(model, state, tokens(3, seed=1)), before)
    assert (state.offset, longer.offset) == (20, 50)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_two_that_go_on_from_one_state_do_not_see_each_other(model: Model, kv_bits: int | None) -> None:
    state = read(model, tokens(20), kv_bits=kv_bits)
    branches = [tokens(9, seed=seed) for seed in (1, 2)]
    alone = [next_logits(model, read(model, tokens(20), kv_bits=kv_bits), branch) for branch in branches]
    forks = [state, state]
    found: list[list[np.ndarray]] = [[], []]
    for at in range(9):
        for i, branch in enumerate(branches):
            hidden, forks[i], _ = model.step(branch[:, at : at + 1], forks[i])
            found[i].append(np.array(model.logits(hidden)))
    for i in range(2):
        assert_near(np.concatenate(found[i], axis=1), alone[i], 0.03 if kv_bits else TOLERANCE)


def test_who_goes_on_alone_copies_nothing(model: Model) -> None:
    state = read(model, tokens(600))
    mx.eval(state.arrays())
    buffers = state.chains[0].buffers()
    chain = state.chains[0].grown(1)
    assert not state.chains[0].is_shared or chain.length == 601
    assert chain.buffers()[0] is buffers[0]


def test_a_branch_that_nobody_holds_is_written_over_without_a_copy(model: Model) -> None:
    state = read(model, tokens(20))
    dropped = model.step(tokens(5, seed=1), state).state
    assert state.chains[0].is_shared
    del dropped
    assert not state.chains[0].is_shared


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_taking_tokens_back_leaves_what_the_kept_ones_alone_leave(checkpoint: Checkpoint, kind: str, kept: int) -> None:
    model, ids = load(checkpoint(kind, with_mtp=True)), tokens(30)
    state = read(model, ids[:, :20])
    tape = model.step(ids[:, 20:24], state, tape=True).tape
    assert tape is not None
    back = tape.keep([kept])
    expected = read(model, ids[:, : 20 + kept])
    assert back.offset == expected.offset == 20 + kept
    assert back.mtp[0].length == 19 + kept
    assert back.last is not None
    assert_near(np.array(back.last), np.array(expected.last))
    assert_near(next_logits(model, back, ids[:, 24:]), next_logits(model, expected, ids[:, 24:]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_keeps_its_own_number_of_tokens(checkpoint: Checkpoint, kind: str) -> None:
    model = load(checkpoint(kind, with_mtp=True))
    prompts = [tokens(count, seed=count) for count in (12, 30, 21)]
    coming = [tokens(4, seed=seed) for seed in (1, 2, 3)]
    joined = State.joined([read(model, prompt) for prompt in prompts])
    tape = model.step(mx.concatenate(coming), joined, tape=True).tape
    assert tape is not None
    back = tape.keep([0, 4, 2])
    for i, kept in enumerate((0, 4, 2)):
        expected = read(model, mx.concatenate([prompts[i], coming[i][:, :kept]], axis=1))
        row = back.row(i)
        assert (row.offset, row.mtp[0].length) == (expected.offset, expected.mtp[0].length)
        assert_near(np.array(row.last), np.array(expected.last))
        assert_near(next_logits(model, row, tokens(3)), next_logits(model, expected, tokens(3)))


def test_joined_sequences_of_different_lengths_equal_each_alone(model: Model) -> None:
    prompts = [tokens(count, seed=count) for count in (3, 40, 17, 1)]
    states = [read(model, prompt) for prompt in prompts]
    expected = [next_logits(model, state, tokens(1)) for state in states]
    joined = State.joined(states)
    found = next_logits(model, joined, mx.concatenate([tokens(1)] * 4))
    for i in range(4):
        assert_near(found[i : i + 1], expected[i])


def test_a_step_that_breaks_off_leaves_the_state_of_before(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls, original = read(model, tokens(20)), [], MLP.__call__
    expected = next_logits(model, state, tokens(12, seed=1))

    def breaking(self: MLP, x: mx.array) -> mx.array:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, x)

    monkeypatch.setattr(MLP, "__call__", breaking)
    with pytest.raises(KeyboardInterrupt):
        model.step(tokens(12, seed=2), state)
    monkeypatch.undo()
    assert np.array_equal(next_logits(model, state, tokens(12, seed=1)), expected)


def test_the_last_token_alone_gives_the_logits_that_all_give(model: Model) -> None:
    text = model.config.text
    for before in (0, 13):
        state = empty_state(text) if not before else model.step(tokens(before, seed=4), empty_state(text)).state
        whole, alone = (model.step(tokens(25), state, last=last) for last in (False, True))
        assert alone.hidden.shape[1] == 1
        assert_near(np.array(model.logits(alone.hidden)), np.array(model.logits(whole.hidden[:, -1:])), 1e-5)
        assert_near(next_logits(model, alone.state, tokens(2)), next_logits(model, whole.state, tokens(2)), 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("tape", [False, True])
def test_replayed_steps_give_the_values_of_the_layers(
    model: Model, monkeypatch: pytest.MonkeyPatch, rows: int, count: int, tape: bool
) -> None:
    states = [read(model, tokens(10 + 3 * i, seed=i)) for i in range(rows)]
    ids = mx.concatenate([tokens(count, seed=50 + i) for i in range(rows)])

    def stepped() -> list[np.ndarray]:
        hidden, state, taped = model.step(ids, State.joined(states), tape=tape)
        kept = [state] if taped is None else [state, taped.keep([i % (count + 1) for i in range(rows)])]
        return [np.array(hidden), *(np.array(part) for each in kept for entry in each.linear for part in entry)]

    replayed = stepped()
    monkeypatch.setattr("mlx_qwen.model.qwen.can_compile", lambda: False)
    for found, expected in zip(replayed, stepped(), strict=True):
        assert_near(found, expected, 1e-5)


def test_a_model_whose_first_layer_is_full_attention_decodes(checkpoint: Checkpoint) -> None:
    model, ids = load(checkpoint("dense", first=1)), tokens(12)
    state = read(model, ids[:, :8])
    pieces = []
    for at in range(8, 12):
        hidden, state, _ = model.step(ids[:, at : at + 1], state)
        pieces.append(np.array(model.logits(hidden)))
    assert_near(np.concatenate(pieces, axis=1), np.array(model(ids))[:, 8:])


@pytest.mark.parametrize("count", [0, 9])
def test_a_tape_of_too_many_tokens_is_refused(model: Model, count: int) -> None:
    state = read(model, tokens(5)) if count else empty_state(model.config.text)
    with pytest.raises(ValueError, match="1 to 8, after a prompt"):
        model.step(tokens(count or 3), state, tape=True)
