"""What answers need is known before they begin: who fits is written, who does not yet waits, who never will is told."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_qwen.checkpoint.released import released
from mlx_qwen.config import ModelConfig, TextConfig
from mlx_qwen.drafting import draft_model_of
from mlx_qwen.engine.engine import Engine, Limits, engine_of
from mlx_qwen.engine.memory import Asked, MemoryPlan, budget_of, check_room, piece_tokens, sequence_bytes, usable_bytes
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model.attention import MOST_SCORE_BYTES
from mlx_qwen.model.cache import kv_packing
from mlx_qwen.model.memory import prefill_bytes, score_bytes
from mlx_qwen.model.qwen import Stepped
from mlx_qwen.model.state import State, empty_state
from tests.engine.conftest import Loaded
from tests.engine.sequences import sequence, written

Checkpoint = Callable[..., Path]
GIB = 1 << 30
PROMPT = [(7 * i) % 280 + 3 for i in range(90)]


@pytest.fixture(scope="module")
def large() -> TextConfig:
    return released("27B").text


@pytest.mark.parametrize("kv_bits", [None, 8, 4])
@pytest.mark.parametrize("with_mtp", [False, True])
@pytest.mark.parametrize("tokens", [1, 255, 256, 1000])
def test_a_state_takes_what_was_planned(
    checkpoint: Checkpoint, kv_bits: int | None, with_mtp: bool, tokens: int
) -> None:
    path = checkpoint("dense", with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))
    text, size = model.config.text, model.dtype.size
    state = model.step(mx.ones((1, tokens), mx.int32), empty_state(text, kv_packing(text, kv_bits), mtp=with_mtp)).state
    planned = sequence_bytes(text, tokens, item_size=size, kv_bits=kv_bits, mtp=with_mtp and tokens > 1)
    assert state.nbytes == planned


def test_published_sizes_take_what_is_published(large: TextConfig) -> None:
    """64 KiB a token of bf16 keys and values, 16 GiB at 262,144, and 144 MiB of fixed-size state."""
    fixed = sequence_bytes(large, 0)
    assert 144 << 20 <= fixed < 148 << 20
    assert sequence_bytes(large, 256) - fixed == 256 * 64 << 10
    assert sequence_bytes(large, 262_144) - fixed == 16 * GIB
    assert sequence_bytes(large, 262_144, mtp=True) - fixed == 17 * GIB


def test_what_can_never_fit_is_refused_with_the_numbers_and_a_way_out(large: TextConfig) -> None:
    asked = Asked(large, 260_096, 2_048)
    check_room(asked, 17 * GIB)
    with pytest.raises(PromptError) as error:
        check_room(asked, 12 * GIB)
    assert str(error.value) == (
        "The state of 262,144 tokens (260,096 of the prompt, 2,048 of max_tokens) takes 16.14 GiB, but this machine "
        "has 12.00 GiB for it beside the weights, enough for 194,048 tokens: use kv_bits=8 (8.64 GiB), or shorten the "
        "prompt."
    )
    with pytest.raises(PromptError, match=r"use kv_bits=4 \(4.64 GiB\), or lower max_tokens to 75,360"):
        check_room(Asked(large, 4_000, 258_144), 5 * GIB)
    with pytest.raises(PromptError, match=r"enough for 0 tokens: shorten the prompt"):
        check_room(asked._replace(kv_bits=4), 1000)


def test_the_budget_is_what_the_weights_leave(loaded: Loaded) -> None:
    budget = budget_of(loaded.model)
    weights = loaded.folder.joinpath("model.safetensors").stat().st_size
    assert 0.9 * usable_bytes() < budget.states + budget.piece + 2 * weights <= usable_bytes() + 2 * weights
    assert budget.states > budget.piece > 0


def test_a_request_is_refused_before_anything_is_computed_and_a_smaller_one_is_answered(loaded: Loaded) -> None:
    text, size = loaded.model.config.text, loaded.model.dtype.size
    room = sequence_bytes(text, 512, item_size=size)
    loaded.model.engine = Engine(loaded.model, Limits(state_bytes=room))
    for options in ({"max_tokens": 800}, {"max_tokens": 500}):
        with pytest.raises(PromptError, match=r"for it beside the weights, enough for 512 tokens"):
            stream_generate(*loaded[:2], PROMPT, **options)  # type: ignore[arg-type]
    assert len(list(stream_generate(*loaded[:2], PROMPT, max_tokens=400, temperature=0))) == 400
    cache = loaded.model.make_cache()
    generate(*loaded[:2], PROMPT, max_tokens=100, temperature=0, prompt_cache=cache)
    with pytest.raises(PromptError, match="enough for 512 tokens"):
        generate(*loaded[:2], PROMPT, max_tokens=350, prompt_cache=cache)


def test_a_draft_models_state_is_planned_with_the_answers(loaded: Loaded, checkpoint: Checkpoint) -> None:
    path = checkpoint("dense", layers=4)
    draft = load_model(path, ModelConfig.from_directory(path))
    both = [(each.config.text, each.dtype.size) for each in (loaded.model, draft)]
    room = sum(sequence_bytes(text, 512, item_size=size) for text, size in both)
    loaded.model.engine = engine = Engine(loaded.model, Limits(state_bytes=room), prefixes=PrefixIndex(1 << 30))
    with pytest.raises(PromptError, match=r"enough for 512 tokens: .*lower max_tokens to 422"):
        generate(*loaded[:2], PROMPT, max_tokens=500, draft_model=draft)
    assert generate(*loaded[:2], PROMPT, max_tokens=500, temperature=0)
    drafter = draft_model_of(*loaded[:2], draft)
    one = sequence(loaded.model, PROMPT, 3, count=422)
    one.draft_model = drafter
    assert engine.memory.needs(one) == room
    written(engine, one)
    assert one.state is not None and one.draft_state is not None
    assert room - 2 * 4096 <= one.state.nbytes + one.draft_state.nbytes <= room


def test_a_draft_models_weights_and_pieces_are_planned_too(loaded: Loaded, checkpoint: Checkpoint) -> None:
    path = checkpoint("dense", layers=4)
    draft = load_model(path, ModelConfig.from_directory(path))
    before = MemoryPlan(loaded.model)
    draft_model_of(*loaded[:2], draft)
    plan = engine_of(loaded.model).memory
    weights = sum(array.nbytes for _, array in tree_flatten(draft.parameters()))
    taken = before.state_bytes + before.piece_bytes - plan.state_bytes - plan.piece_bytes
    assert taken == pytest.approx(weights, abs=2)
    loaded.model.engine = Engine(loaded.model, Limits(piece_bytes=0), prefixes=PrefixIndex(1 << 30))
    drafter, pieces = draft_model_of(*loaded[:2], draft), []
    assert drafter is not None
    step, one = draft.step, sequence(loaded.model, PROMPT, 3, count=4)
    draft.step = lambda ids, *rest, **how: (pieces.append(ids.shape[1]), step(ids, *rest, **how))[1]  # type: ignore[assignment,func-returns-value]
    one.draft_model = drafter
    written(loaded.model.engine, one)
    assert pieces[:3] == [32, 32, 26]


def test_what_a_draft_model_has_read_makes_room_for_answers(loaded: Loaded, checkpoint: Checkpoint) -> None:
    path = checkpoint("dense", layers=4)
    draft = load_model(path, ModelConfig.from_directory(path))
    both = [(each.config.text, each.dtype.size) for each in (loaded.model, draft)]
    room = 2 * sum(sequence_bytes(text, 256, item_size=size) for text, size in both)
    loaded.model.engine = engine = Engine(loaded.model, Limits(state_bytes=room), prefixes=PrefixIndex(1 << 30))
    for first in range(5, 12):
        generate(*loaded[:2], [first, *PROMPT], max_tokens=4, temperature=0, draft_model=draft)
        assert engine.prefixes is not None and engine.draft_model is not None
        held = engine.prefixes.nbytes + engine.draft_model[1].shed(1 << 30)
        assert held <= room + sum(sequence_bytes(text, 256, item_size=size) for text, size in both)


def test_prefixes_make_room_for_answers_and_what_is_in_use_is_not_shed_in_vain(loaded: Loaded) -> None:
    text, size = loaded.model.config.text, loaded.model.dtype.size
    room = 3 * sequence_bytes(text, 256, item_size=size)
    loaded.model.engine = engine = Engine(loaded.model, Limits(state_bytes=room), prefixes=PrefixIndex(1 << 30))
    assert engine.prefixes is not None
    for first in range(5, 12):
        generate(*loaded[:2], [first, *PROMPT], max_tokens=4, temperature=0)
    # Each leaves three checkpoints; what did not fit beside the last answer went before it.
    assert 3 <= len(engine.prefixes) < 12
    assert engine.prefixes.nbytes < room + sequence_bytes(text, 256, item_size=size)
    last = list(stream_generate(*loaded[:2], [11, *PROMPT, 6], max_tokens=4, temperature=0))
    assert last[-1].cached_tokens == len(PROMPT) + 1


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_pieces_of_any_size_give_the_same_answer(loaded: Loaded, kv_bits: int | None) -> None:
    prompt = PROMPT * 3
    found = {
        tuple(r.token for r in stream_generate(*loaded[:2], prompt, temperature=0, max_tokens=8, kv_bits=kv_bits,
                                               prefill_step_size=step, prefix_cache=False))
        for step in (1, 2, 3, 7, 31, 64, 65, 129, 255, 256, 257, 269, 270, 4096)
    }  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_pieces_shrink_until_they_fit_and_the_answer_is_the_same(loaded: Loaded, kv_bits: int | None) -> None:
    prompt, places = PROMPT * 5, []
    how = {"temperature": 0, "max_tokens": 8, "kv_bits": kv_bits, "prefix_cache": False}
    expected = generate(*loaded[:2], prompt, **how)  # type: ignore[arg-type]
    text, size = loaded.model.config.text, loaded.model.dtype.size
    most = prefill_bytes(text, 64, len(prompt), kv_bits=kv_bits, item_size=size)
    loaded.model.engine = Engine(loaded.model, Limits(piece_bytes=most))
    found = generate(*loaded[:2], prompt, progress=lambda done, _: places.append(done), **how)  # type: ignore[arg-type]
    pieces = {later - before for before, later in pairwise(places)}
    assert found == expected
    assert 32 < max(pieces) <= 256
    assert places[-1] == len(prompt)


def test_the_longest_contexts_are_read_in_pieces_that_fit(large: TextConfig) -> None:
    for kv_bits in (None, 8):
        for read in (0, 32_000, 250_000):
            tokens = piece_tokens(large, 2048, read, 2 * GIB, kv_bits=kv_bits)
            assert prefill_bytes(large, tokens, read + tokens, kv_bits=kv_bits) <= 2 * GIB
            assert tokens >= 64
    assert piece_tokens(large, 2048, 0, 2 * GIB) == 2048
    assert piece_tokens(large, 2048, 250_000, 0) == 32
    assert piece_tokens(large, 7, 250_000, 0) == 7


def test_scores_are_bounded_in_bytes_whatever_their_precision(large: TextConfig) -> None:
    """24 heads, 2,048 queries and 250,000 keys: more than the bound in either precision."""
    short, full = (score_bytes(large, 2048, 250_000, item_size=size) for size in (2, 4))
    assert MOST_SCORE_BYTES * 0.9 < full <= short <= MOST_SCORE_BYTES * (1 + 1 / 24)
    rest = [prefill_bytes(large, 2048, 250_000, item_size=size) for size in (2, 4)]
    assert rest[1] - full < 2 * (rest[0] - short)
    assert prefill_bytes(large, 2048, 34_048, item_size=4) < 1.02 * rest[1]
    assert piece_tokens(large, 2048, 32_000, int(1.02 * rest[1]), item_size=4) == 2048


def test_a_prompt_in_pieces_copies_no_keys_and_values(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    step, room = loaded.model.step, []

    def noted(ids: mx.array, *rest: State, **how: bool) -> Stepped:
        stepped = step(ids, *rest, **how)
        if ids.shape[1] > 1:
            room.append({part.shape[-2] for part in stepped.state.chains[0].buffers()})
        return stepped

    monkeypatch.setattr(loaded.model, "step", noted)
    one = sequence(loaded.model, PROMPT * 10, 0, count=4)
    one.step_size = 100
    written(Engine(loaded.model), one)
    assert room == [{1024}] * 9


def test_a_window_of_keys_and_values_is_explained_and_not_ignored(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match="max_kv_size is 4096, but these models keep all that they read") as error:
        generate(*loaded[:2], PROMPT, max_kv_size=4096)
    assert "kv_bits=8 or 4" in str(error.value)
