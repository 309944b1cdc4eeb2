"""Reasoning that goes round in a circle is closed, an answer follows, and what was spent on it adds up."""

from itertools import cycle, islice

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.engine.loops import Loops
from mlx_qwen.generation import batch_generate, stream_generate
from mlx_qwen.options import LogitsProcessor
from tests.engine.conftest import Loaded

PROMPT = "<|im_start|>assistant\n<think>\n"
BLOCK = [70, 71, 72, 73, 74, 75, 76, 77, 78, 79]


def first_loop(tokens: list[int]) -> int | None:
    """After how many tokens a loop is seen."""
    loops = Loops()
    return next((at for at, token in enumerate(tokens, 1) if loops.saw(token)), None)


def repeating(loaded: Loaded) -> LogitsProcessor:
    """Writes the block over and over while the think block is open, and then what the model likes, but no new block."""
    start, end = loaded.processor.thinking
    begun = len(loaded.processor.encode(PROMPT))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        places = mx.arange(logits.shape[-1])
        written = tokens[begun:].tolist()
        if end in written:
            return mx.where((places == start) | (places == end), -mx.inf, logits)
        return mx.where(places == BLOCK[len(written) % len(BLOCK)], logits, -mx.inf)

    return process


def answer(loaded: Loaded, **options: object) -> list[GenerationResponse]:
    options = {"temperature": 0, "max_tokens": 320, **options}
    return list(stream_generate(loaded.model, loaded.processor, PROMPT, **options))  # type: ignore[arg-type]


def test_a_loop_is_closed_with_its_reason_and_the_answer_follows(loaded: Loaded) -> None:
    responses = answer(loaded, logits_processors=[repeating(loaded)])
    written = [r.token for r in responses]
    spent, closing = len(BLOCK) + 256, loaded.processor.encode("\n</think>\n\n")
    assert written[:spent] == list(islice(cycle(BLOCK), spent))
    assert written[spent : spent + len(closing)] == closing
    last = responses[-1]
    assert (last.thinking_closed_by, last.reasoning_tokens) == ("loop", spent)
    assert last.generation_tokens == len(written) == 320
    assert responses[spent - 2].thinking_closed_by is None
    assert last.content


def test_a_loop_goes_on_where_that_is_asked_for(loaded: Loaded) -> None:
    responses = answer(loaded, logits_processors=[repeating(loaded)], close_loops=False)
    assert loaded.processor.thinking[1] not in [r.token for r in responses]
    assert (responses[-1].thinking_closed_by, responses[-1].reasoning_tokens) == (None, 320)
    assert responses[-1].finish_reason == "length"


def test_a_loop_is_closed_in_a_batch_as_alone(loaded: Loaded) -> None:
    options = {"temperature": 0, "max_tokens": 300, "logits_processors": [repeating(loaded)]}
    rows = batch_generate(loaded.model, loaded.processor, [PROMPT] * 3, return_responses=True, **options)  # type: ignore[call-overload]
    assert {(row.thinking_closed_by, row.reasoning_tokens, row.text) for row in rows} == {
        ("loop", 266, "".join(r.text for r in answer(loaded, **options)))
    }


@pytest.mark.parametrize("budget", [0, 1, 50])
def test_what_a_budget_allows_is_spent_and_no_more(loaded: Loaded, budget: int) -> None:
    responses = answer(loaded, thinking_budget=budget, logits_processors=[repeating(loaded)], max_tokens=100)
    last = responses[-1]
    closing = loaded.processor.encode("\n</think>\n\n")
    assert (last.reasoning_tokens, last.thinking_closed_by) == (budget, "budget")
    assert [r.token for r in responses][budget : budget + len(closing)] == closing
    assert [r.reasoning_tokens for r in responses][: budget + 1] == [*range(1, budget + 1), budget]
    assert last.content


@pytest.mark.parametrize("period", [1, 7, 8, 40, 86, 200, 512])
def test_a_loop_is_seen_as_soon_as_it_is_long_enough(period: int) -> None:
    rng = np.random.default_rng(period)
    before, block = rng.integers(1000, 2000, 300).tolist(), list(range(period))
    repeated = 1024 if period < 8 else max(256, 3 * period)
    assert first_loop([*before, *islice(cycle(block), 5000)]) == len(before) + period + repeated


@pytest.mark.parametrize(
    "tokens",
    [
        [token for row in range(200) for token in (5, 6, row, 7, 8, 9, 10, 11, 12, 13)],
        [0, 1] * 500,
        [*range(100)] * 3,
        np.random.default_rng(0).integers(0, 3, 5000).tolist(),
    ],
    ids=["a numbered list", "a row of zeros", "a paragraph three times", "few words at random"],
)
def test_what_is_written_on_purpose_is_no_loop(tokens: list[int]) -> None:
    assert first_loop(tokens) is None


def test_a_fork_goes_on_by_itself() -> None:
    loops = Loops()
    for token in islice(cycle(BLOCK), 265):
        assert not loops.saw(token)
    fork = loops.fork()
    assert not fork.saw(5)
    assert not fork.saw(BLOCK[6])
    assert loops.saw(BLOCK[5])
