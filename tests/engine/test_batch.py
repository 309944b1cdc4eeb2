"""Every row of a batch is what its prompt gives alone."""

import mlx.core as mx
import pytest

from mlx_qwen.errors import PromptError
from mlx_qwen.generation import batch_generate, generate, stream_generate
from tests.engine.conftest import Loaded, make_processor

PROMPTS = [[(11 * i * n) % 280 + 3 for i in range(1, n + 1)] for n in (5, 40, 17)]
OPTIONS = {"temperature": 0, "max_tokens": 20}


def solo(loaded: Loaded, index: int, **options: object) -> str:
    return generate(loaded.model, loaded.processor, PROMPTS[index], **{**OPTIONS, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [2048, 16])
def test_rows_of_different_lengths_equal_solo_runs(loaded: Loaded, step: int) -> None:
    batch = batch_generate(loaded.model, loaded.processor, PROMPTS, prefill_step_size=step, **OPTIONS)  # type: ignore[arg-type]
    assert batch == [solo(loaded, index) for index in range(3)]


def test_sampled_rows_equal_solo_runs_with_their_own_seed(loaded: Loaded) -> None:
    options = {**OPTIONS, "temperature": 1.0, "presence_penalty": 2.0}
    batch = batch_generate(loaded.model, loaded.processor, PROMPTS, seed=5, **options)  # type: ignore[arg-type]
    assert batch == [solo(loaded, index, **options, seed=5 + index) for index in range(3)]


def test_every_row_stops_by_itself(loaded: Loaded) -> None:
    ids = loaded.processor.encode(solo(loaded, 1))
    with_end = loaded._replace(processor=make_processor(ends=(ids[3],)))
    batch = batch_generate(with_end.model, with_end.processor, PROMPTS, **OPTIONS)  # type: ignore[arg-type]
    assert batch == [solo(with_end, index) for index in range(3)]
    assert len(batch[1]) < len(solo(loaded, 1))


def test_no_prompts_give_no_answers(loaded: Loaded) -> None:
    assert batch_generate(loaded.model, loaded.processor, []) == []


def test_one_conversation_instead_of_a_list_is_refused(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match="list of conversations"):
        batch_generate(loaded.model, loaded.processor, [{"role": "user", "content": "hi"}])  # type: ignore[list-item]


def test_one_string_instead_of_a_list_is_refused(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match="list of prompts"):
        batch_generate(loaded.model, loaded.processor, "hi")


def test_responses_of_a_batch_hold_whole_answers_and_what_each_row_read_and_wrote(loaded: Loaded) -> None:
    options = {**OPTIONS, "stop": "a", "prefix_cache": False}
    found = batch_generate(loaded.model, loaded.processor, PROMPTS, return_responses=True, **options)  # type: ignore[arg-type]
    for index, response in enumerate(found):
        alone = list(stream_generate(loaded.model, loaded.processor, PROMPTS[index], **options))  # type: ignore[arg-type]
        assert response.text == "".join(one.text for one in alone)
        last = alone[-1]
        for name in ("token", "prompt_tokens", "generation_tokens", "finish_reason", "reasoning", "tool_calls"):
            assert getattr(response, name) == getattr(last, name), name
        assert mx.allclose(response.logprobs, last.logprobs, atol=1e-4)
    assert {response.finish_reason for response in found} == {"stop", "length"}


@pytest.mark.parametrize(
    "prompts", [None, 5, b"hi", (prompt for prompt in PROMPTS)], ids=["none", "number", "bytes", "generator"]
)
def test_what_is_no_list_of_prompts_is_refused(loaded: Loaded, prompts: object) -> None:
    with pytest.raises(PromptError, match="takes a list of prompts"):
        batch_generate(loaded.model, loaded.processor, prompts)  # type: ignore[call-overload]
