"""Responses name tokens with the log-probabilities that the model's distribution gives them."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen.engine.token_names import TokenNames
from mlx_qwen.generation import batch_generate, stream_generate
from mlx_qwen.loading import load
from tests.engine.conftest import Loaded
from tests.support.tokenizers import tiny_tokenizer


def test_the_likeliest_tokens_are_those_of_the_whole_distribution(loaded: Loaded) -> None:
    answer = list(stream_generate(loaded.model, loaded.processor, "which", max_tokens=8, logprobs=5, temperature=0))
    for response in answer:
        logprobs = np.array(response.logprobs)
        order = np.argsort(-logprobs, kind="stable")[:5]
        assert [one.token for one in response.top_logprobs] == order.tolist()
        np.testing.assert_allclose([one.logprob for one in response.top_logprobs], logprobs[order], atol=1e-6)
        own = response.own_logprob
        assert own is not None
        assert (own.token, own.logprob) == (response.token, pytest.approx(logprobs[response.token], abs=1e-6))
        assert own == response.top_logprobs[0]


@pytest.mark.parametrize(("asked", "named"), [(None, None), (0, 0)])
def test_alternatives_come_only_where_they_are_asked_for(loaded: Loaded, asked: int | None, named: int | None) -> None:
    (response,) = stream_generate(loaded.model, loaded.processor, "which", max_tokens=1, logprobs=asked)
    assert response.top_logprobs == ()
    assert (response.own_logprob is None) == (named is None)


def test_a_token_that_a_rule_forces_has_its_own_log_probability(loaded: Loaded) -> None:
    forced = {"thinking_budget": 0, "enable_thinking": True, "max_tokens": 3, "logprobs": 1}
    messages = [{"role": "user", "content": "a"}]
    for response in stream_generate(loaded.model, loaded.processor, messages, **forced):  # type: ignore[arg-type]
        assert response.own_logprob is not None
        assert response.own_logprob.token == response.token
        assert response.own_logprob.logprob == pytest.approx(float(response.logprobs[response.token].item()), abs=1e-6)


def test_drafts_and_batches_change_no_log_probability() -> None:
    model, processor = load()
    chats = [[{"role": "user", "content": text}] for text in ("What is 37+58?", "Write the word sun backwards.")]
    options = {"max_tokens": 12, "logprobs": 3, "temperature": 0}

    def written(mtp: int, chat: object) -> list[object]:
        answer = stream_generate(model, processor, chat, mtp=mtp, **options)  # type: ignore[arg-type]
        return [(one.token, one.from_draft, one.top_logprobs, one.own_logprob) for one in answer]

    for chat in chats:
        plain, drafted = written(0, chat), written(3, chat)
        assert any(one[1] for one in drafted)  # type: ignore[index]
        for one, other in zip(plain, drafted, strict=True):
            assert one[0] == other[0]  # type: ignore[index]
            assert [top.token for top in one[2]] == [top.token for top in other[2]]  # type: ignore[index]
            found, expected = ([top.logprob for top in each[2]] for each in (other, one))  # type: ignore[index]
            np.testing.assert_allclose(found, expected, atol=2e-2)
    last = batch_generate(model, processor, chats, return_responses=True, **options)  # type: ignore[call-overload]
    for response, chat in zip(last, chats, strict=True):
        alone = list(stream_generate(model, processor, chat, **options))[-1]  # type: ignore[arg-type]
        assert [one.token for one in response.top_logprobs] == [one.token for one in alone.top_logprobs]
        assert response.own_logprob.token == alone.own_logprob.token


def test_the_bytes_of_all_tokens_together_are_the_text() -> None:
    tokenizer = tiny_tokenizer()
    names, text = TokenNames(tokenizer), "Ünï 🌦 <think>\x00\n\xad~ and user"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(map(names.bytes_of, ids)) == text.encode()
    assert names.bytes_of(10**6) == b""


def test_only_what_was_asked_for_is_computed(loaded: Loaded) -> None:
    from mlx_qwen.engine.sampling import TokenSampler
    from mlx_qwen.recommended import GREEDY

    logits = mx.array(np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32))
    for top in (0, 4):
        sampler = TokenSampler(GREEDY, prompt=mx.array([0]), vocab_size=50, top_logprobs=top)
        choice = sampler.choose(logits, sampler.start())
        assert [part.shape for part in choice.top] == [(1, 4)] * 2 * bool(top)
