"""One answer: the reference's tokens, whole text, the right end, and honest numbers."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import MLXQwenError, PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from tests.engine.conftest import Loaded, make_processor
from tests.support.checkpoints import reference_model

PROMPT = [int(token) for token in torch.randint(3, 290, (23,), generator=torch.Generator().manual_seed(0))]


def responses(loaded: Loaded, prompt: object = PROMPT, **options: object) -> list[GenerationResponse]:
    options = {"temperature": 0, "max_tokens": 12, **options}
    return list(stream_generate(loaded.model, loaded.processor, prompt, **options))  # type: ignore[arg-type]


def tokens(loaded: Loaded, prompt: object = PROMPT, **options: object) -> list[int]:
    return [response.token for response in responses(loaded, prompt, **options)]


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_64_greedy_tokens_equal_transformers(checkpoint, kind: str) -> None:
    folder = checkpoint(kind)
    model = load_model(folder, ModelConfig.from_directory(folder))
    reference = reference_model(folder)
    expected = reference.generate(
        torch.tensor([PROMPT]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert tokens(Loaded(model, make_processor(), folder), max_tokens=64) == expected[0, len(PROMPT) :].tolist()


def test_the_pieces_of_text_join_to_the_text_of_all_tokens(loaded: Loaded) -> None:
    answer = responses(loaded, max_tokens=40)
    assert "".join(r.text for r in answer) == loaded.processor.decode([r.token for r in answer])
    assert generate(loaded.model, loaded.processor, PROMPT, temperature=0, max_tokens=40) == "".join(
        r.text for r in answer
    )


def test_an_answer_cut_inside_a_character_keeps_the_bytes_that_came(loaded: Loaded) -> None:
    half = loaded.processor.encode("é")[0]
    cut = responses(loaded, max_tokens=1, temperature=None, sampler=lambda logprobs: mx.array([half]))
    assert cut[-1].text == loaded.processor.decode([half]) == "\ufffd"


def test_responses_count_tokens_and_only_the_last_says_why_it_ended(loaded: Loaded) -> None:
    answer = responses(loaded)
    assert [r.generation_tokens for r in answer] == list(range(1, 13))
    assert [r.finish_reason for r in answer] == [None] * 11 + ["length"]
    assert {(r.prompt_tokens, r.cached_tokens, r.from_draft) for r in answer} == {(23, 0, False)}
    assert all(r.prompt_tps > 0 and r.generation_tps > 0 and r.peak_memory > 0 for r in answer)


def test_logprobs_are_the_models_log_probabilities_of_each_step(loaded: Loaded) -> None:
    answer = responses(loaded)
    ids = mx.array([PROMPT + [r.token for r in answer]])
    logits = loaded.model(ids)[0, len(PROMPT) - 1 : -1].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert mx.allclose(mx.stack([r.logprobs for r in answer]), expected, atol=1e-3)


def test_text_ids_and_messages_with_the_same_tokens_give_the_same_answer(loaded: Loaded) -> None:
    messages = [{"role": "user", "content": "What is the answer?"}]
    text = loaded.processor.apply_chat_template(messages, enable_thinking=False)
    by_messages = tokens(loaded, messages, enable_thinking=False)
    ids = loaded.processor.encode(text)
    assert by_messages == tokens(loaded, text) == tokens(loaded, ids)


@pytest.mark.parametrize("array", [mx.array, np.array, lambda ids: mx.array([ids]), lambda ids: list(np.array(ids))])
def test_arrays_of_token_ids_are_read_as_lists_of_them_are(
    loaded: Loaded, array: Callable[[list[int]], object]
) -> None:
    assert tokens(loaded, array(PROMPT), max_tokens=3) == tokens(loaded, max_tokens=3)


def test_any_end_token_ends_the_answer_and_its_text_is_left_out(loaded: Loaded) -> None:
    free = tokens(loaded)
    end = next(token for token in free if token != free[0])
    length = free.index(end) + 1
    stopped = responses(loaded._replace(processor=make_processor(ends=(end, 299))))
    assert [r.token for r in stopped] == free[:length]
    assert stopped[-1].finish_reason == "stop"
    assert "".join(r.text for r in stopped) == loaded.processor.decode(free[: length - 1])


def test_a_stop_string_ends_the_answer_before_any_of_it_is_shown(loaded: Loaded) -> None:
    whole = "".join(r.text for r in responses(loaded, max_tokens=40))
    stop = whole[10:14]
    stopped = responses(loaded, max_tokens=40, stop=["never found", stop])
    assert "".join(r.text for r in stopped) == whole[: whole.index(stop)]
    assert stopped[-1].finish_reason == "stop"


def test_a_stop_string_that_never_comes_loses_no_text(loaded: Loaded) -> None:
    whole = responses(loaded, max_tokens=40)
    last = "".join(r.text for r in whole)[-1]
    held = responses(loaded, max_tokens=40, stop=f"{last} and more")
    assert "".join(r.text for r in held) == "".join(r.text for r in whole)


def test_the_head_runs_on_the_last_position_only(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = Model.logits

    def recording(self: Model, hidden: mx.array) -> mx.array:
        lengths.append(hidden.shape[1])
        return original(self, hidden)

    monkeypatch.setattr(Model, "logits", recording)
    responses(loaded, max_tokens=3)
    assert set(lengths) == {1}
    assert len(lengths) == 3


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(loaded: Loaded, prompt: object) -> None:
    with pytest.raises(PromptError, match="empty"):
        stream_generate(loaded.model, loaded.processor, prompt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ([5, 320], "Token id 320"),
        ([5, "x"], "neither text"),
        ([5, {"role": "user", "content": "hi"}], "neither text"),
        ({"role": "user", "content": "hi"}, "neither text"),
        ([True, False], "neither text"),
        (mx.array([True, False]), "neither text"),
        (mx.array([[5], [6]]), "one row of token ids"),
        (np.array([0.5]), "neither text"),
        (mx.array(5), "neither text"),
        (b"hi", "neither text"),
    ],
)
def test_a_prompt_of_no_known_form_is_refused(loaded: Loaded, prompt: object, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        stream_generate(loaded.model, loaded.processor, prompt)  # type: ignore[arg-type]


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(loaded: Loaded) -> None:
    with pytest.raises(PromptError, match=r"2,049 tokens.*2,048.*Shorten"):
        stream_generate(loaded.model, loaded.processor, [5] * 2049)


def test_an_answer_ends_where_the_context_does(loaded: Loaded) -> None:
    answer = responses(loaded, [5] * 2040, max_tokens=100)
    assert len(answer) == 8
    assert answer[-1].finish_reason == "length"


def test_sampling_with_a_seed_gives_the_same_text_again(loaded: Loaded) -> None:
    options = {"temperature": 1.0, "seed": 3}
    first = tokens(loaded, **options)
    mx.random.normal((2,))
    assert tokens(loaded, **options) == first
    assert tokens(loaded, **options | {"seed": 4}) != first


def test_logits_that_are_no_numbers_are_an_error_and_not_garbage(checkpoint) -> None:
    folder = checkpoint("dense")
    model = load_model(folder, ModelConfig.from_directory(folder))
    model.norm.weight = model.norm.weight * mx.nan
    with pytest.raises(MLXQwenError, match="not numbers"):
        generate(model, make_processor(), PROMPT, temperature=0)


def test_verbose_prints_the_text_statistics_and_packed_layers(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    text = generate(loaded.model, loaded.processor, PROMPT, max_tokens=5, temperature=0, kv_bits=8, verbose=True)
    printed = capsys.readouterr().out
    assert "KV cache: 8 bits in 1 attention layers (3); the 3 linear-attention layers keep fp32 state" in printed
    assert text in printed
    assert "Prompt: 23 tokens, " in printed
    assert "Generation: 5 tokens, " in printed
    assert "Peak memory: " in printed


def test_tool_calls_and_reasoning_arrive_with_the_last_response(loaded: Loaded) -> None:
    script = "Hm.\n</think>\n\nOK<tool_call>\n<function=f>\n<parameter=n>\n4\n</parameter>\n</function>\n</tool_call>"
    written = iter(loaded.processor.encode(script))
    schema = {"function": {"name": "f", "parameters": {"properties": {"n": {"type": "integer"}}}}}
    answer = responses(
        loaded,
        "<|im_start|>assistant\n<think>\n",
        temperature=None,
        sampler=lambda logprobs: mx.array([next(written)]),
        max_tokens=len(loaded.processor.encode(script)),
        tools=[schema],
    )
    assert answer[-1].reasoning == "Hm."
    assert [(call.name, call.arguments) for call in answer[-1].tool_calls] == [("f", {"n": 4})]
    assert "".join(r.text for r in answer) == script
    assert all(r.reasoning is None and not r.tool_calls for r in answer[:-1])
    deltas = [r.delta for r in answer]
    assert ("".join(d.reasoning for d in deltas), "".join(d.content for d in deltas)) == ("Hm.", "OK")
    calls = [call for d in deltas for call in d.tool_calls]
    assert [call.name for call in calls if call.name] == ["f"]
    assert "".join(call.arguments for call in calls) == '{"n": 4}'
    assert answer[-1].content == "OK"
    assert answer[-1].answer.finish_reason == answer[-1].finish_reason == "length"


def test_an_answer_that_ends_with_a_call_says_so(loaded: Loaded) -> None:
    written = iter(loaded.processor.encode("<tool_call>\n<function=f>\n</function>\n</tool_call>"))
    answer = responses(
        loaded._replace(processor=make_processor(ends=(299,))),
        temperature=None,
        sampler=lambda logprobs: mx.array([next(written, 299)]),
        max_tokens=100,
    )
    assert answer[-1].finish_reason == "tool_calls"
    assert [call.name for call in answer[-1].tool_calls] == ["f"]


def test_tools_whose_schema_makes_no_sense_are_refused_before_anything_is_read(loaded: Loaded) -> None:
    schema = {"function": {"name": "f", "parameters": {"properties": {"n": {"type": "intger"}}}}}
    with pytest.raises(PromptError, match="Tool f, n: type is 'intger'"):
        stream_generate(loaded.model, loaded.processor, PROMPT, tools=[schema])
