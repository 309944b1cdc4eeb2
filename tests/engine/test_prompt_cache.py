"""Prompts are read in pieces, after what a cache already holds, and interrupts leave the cache usable."""

import sys

import mlx.core as mx
import pytest

from mlx_qwen.engine.caching import seen_tokens
from mlx_qwen.generation import generate, stream_generate
from tests.engine.conftest import Loaded

PROMPT = [(7 * i) % 280 + 3 for i in range(50)]


def answer(loaded: Loaded, prompt: list[int] = PROMPT, **options: object) -> list[int]:
    options = {"temperature": 0, "max_tokens": 10, **options}
    return [r.token for r in stream_generate(loaded.model, loaded.processor, prompt, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, 7, 49, 50, 64])
def test_a_prompt_read_in_pieces_gives_the_same_answer(loaded: Loaded, step: int) -> None:
    assert answer(loaded, prefill_step_size=step) == answer(loaded)


def test_progress_counts_the_prompts_tokens(loaded: Loaded) -> None:
    calls: list[tuple[int, int]] = []
    answer(loaded, prefill_step_size=20, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 50), (20, 50), (40, 50), (50, 50)]


def test_progress_true_shows_a_line_on_stderr(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    answer(loaded, progress=True)
    assert "50 of 50 tokens\n" in capsys.readouterr().err


def test_a_terminals_line_of_progress_is_wiped_at_the_end(
    loaded: Loaded, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    answer(loaded, progress=True)
    assert capsys.readouterr().err.endswith("50 of 50 tokens\r\033[K")


def test_a_prompt_goes_on_after_what_the_cache_has_seen(loaded: Loaded) -> None:
    cache = loaded.model.make_cache()
    loaded.model.hidden_states(mx.array([PROMPT[:30]]), cache)
    rest = list(
        stream_generate(loaded.model, loaded.processor, PROMPT[30:], temperature=0, max_tokens=10, prompt_cache=cache)
    )
    assert [r.token for r in rest] == answer(loaded)
    assert {(r.cached_tokens, r.prompt_tokens) for r in rest} == {(30, 20)}


def test_after_an_answer_the_cache_has_seen_all_but_its_last_token(loaded: Loaded) -> None:
    cache = loaded.model.make_cache()
    first = answer(loaded, prompt_cache=cache)
    assert cache.offset == len(PROMPT) + len(first) - 1
    assert answer(loaded, [first[-1], 9], prompt_cache=cache) == answer(loaded, [*PROMPT, *first, 9])


def test_penalties_and_logits_processors_reach_back_to_what_the_cache_has_seen(loaded: Loaded) -> None:
    def recording(tokens: mx.array, logits: mx.array) -> mx.array:
        histories.append(tokens.tolist())
        return logits

    histories: list[list[int]] = []
    cache = loaded.model.make_cache()
    options = {"logits_processors": [recording], "repetition_penalty": 1.5}
    first = answer(loaded, prompt_cache=cache, **options)
    second = answer(loaded, [first[-1], 9], prompt_cache=cache, **options)
    continued = histories[len(first) :]
    histories.clear()
    assert second == answer(loaded, [*PROMPT, *first, 9], **options)
    assert continued == histories


def test_tokens_that_the_model_read_by_itself_do_not_shift_the_known_ones(loaded: Loaded) -> None:
    cache = loaded.model.make_cache()
    loaded.model.hidden_states(mx.array([PROMPT[:30]]), cache)
    first = answer(loaded, PROMPT[30:], prompt_cache=cache)
    assert seen_tokens(cache) == [*PROMPT[30:], *first[:-1]]


def test_after_an_interrupted_prompt_only_the_pieces_that_were_read_are_history(loaded: Loaded) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    cache = loaded.model.make_cache()
    with pytest.raises(KeyboardInterrupt):
        answer(loaded, prompt_cache=cache, prefill_step_size=20, progress=interrupt)
    assert seen_tokens(cache) == PROMPT[:20]


def test_a_prompt_that_fits_no_more_after_the_cached_tokens_is_refused(loaded: Loaded) -> None:
    cache = loaded.model.make_cache()
    loaded.model.hidden_states(mx.array([PROMPT]), cache)
    with pytest.raises(ValueError, match="2,000 tokens after 50 in the cache"):
        answer(loaded, [5] * 2000, prompt_cache=cache)


def test_an_interrupt_between_pieces_leaves_whole_pieces_in_the_cache(loaded: Loaded) -> None:
    cache = loaded.model.make_cache()

    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(loaded, prompt_cache=cache, prefill_step_size=20, progress=interrupt)
    assert cache.offset == 20
    assert answer(loaded, PROMPT[20:], prompt_cache=cache) == answer(loaded)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_keys_and_values_change_the_answer_little(loaded: Loaded, bits: int) -> None:
    def logprobs(**options: object) -> mx.array:
        stream = stream_generate(loaded.model, loaded.processor, PROMPT, temperature=0, max_tokens=2, **options)  # type: ignore[arg-type]
        return mx.stack([r.logprobs for r in stream])

    difference = mx.abs(logprobs(kv_bits=bits) - logprobs()).max().item()
    assert 0 < difference < (0.2 if bits == 8 else 2)


def test_the_wired_limit_is_raised_for_the_answer_and_restored(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = [1000]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 5_000_000_000})
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    generate(loaded.model, loaded.processor, PROMPT, temperature=0, max_tokens=2)
    assert limits == [1000, 5_000_000_000, 1000]
