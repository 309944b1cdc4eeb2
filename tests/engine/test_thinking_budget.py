"""A thinking budget closes the reasoning and still yields an answer."""

import mlx.core as mx
import pytest

from mlx_qwen.answer.response import GenerationResponse
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import stream_generate
from mlx_qwen.options import LogitsProcessor
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate
from tests.engine.conftest import Loaded
from tests.support.tokenizers import CHAT_TEMPLATE, TAGS, tiny_tokenizer

THINKING_PROMPT = "<|im_start|>assistant\n<think>\n"
CLOSED_PROMPT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def answer(loaded: Loaded, prompt: str | list[int], **options: object) -> list[GenerationResponse]:
    options = {"temperature": 0, "max_tokens": 150, **options}
    return list(stream_generate(loaded.model, loaded.processor, prompt, **options))  # type: ignore[arg-type]


def never_think(loaded: Loaded) -> LogitsProcessor:
    """Keeps the model from opening a block of its own."""
    start = loaded.processor.thinking[0]
    return lambda tokens, logits: mx.where(mx.arange(logits.shape[-1]) == start, -mx.inf, logits)


@pytest.mark.parametrize("budget", [0, 1, 10])
def test_reasoning_ends_after_the_budget_and_the_answer_follows(loaded: Loaded, budget: int) -> None:
    free = [r.token for r in answer(loaded, THINKING_PROMPT)]
    limited = answer(loaded, THINKING_PROMPT, thinking_budget=budget)
    written = [r.token for r in limited]
    closed = written.index(loaded.processor.thinking[1])
    assert written[:budget] == free[:budget]
    assert loaded.processor.decode(written[budget:closed]) == "\n"
    assert loaded.processor.decode(written[closed + 1 :]).startswith("\n\n")
    assert len(written) == 150
    assert (limited[-1].reasoning or "") == loaded.processor.decode(written[:budget]).strip("\n")


def test_the_model_reads_the_closing_as_part_of_its_answer(loaded: Loaded) -> None:
    options = {"logits_processors": [never_think(loaded)]}
    limited = answer(loaded, THINKING_PROMPT, thinking_budget=5, **options)
    end = loaded.processor.thinking[1]
    after = [r.token for r in limited].index(end) + 1 + len(loaded.processor.encode("\n\n"))
    prompt = [*loaded.processor.encode(THINKING_PROMPT), *(r.token for r in limited[:after])]
    continued = answer(loaded, prompt, max_tokens=150 - after, **options)
    assert [r.token for r in continued] == [r.token for r in limited[after:]]


def test_only_tokens_inside_the_block_count(loaded: Loaded) -> None:
    options = {"logits_processors": [never_think(loaded)]}
    free, limited = (
        [r.token for r in answer(loaded, CLOSED_PROMPT, thinking_budget=budget, **options)] for budget in (None, 1)
    )
    assert limited == free


def test_a_budget_for_a_vocabulary_without_think_tokens_is_refused(loaded: Loaded) -> None:
    tokenizer = tiny_tokenizer(256 + 3 + len(TAGS))
    plain = type(tokenizer).from_str(tokenizer.to_str().replace("think>", "thick>"))
    processor = Processor(plain, template=ChatTemplate({"default": CHAT_TEMPLATE}), end_token_ids=frozenset())
    with pytest.raises(PromptError, match="no <think>"):
        stream_generate(loaded.model, processor, "hi", thinking_budget=5)
