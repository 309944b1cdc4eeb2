"""What options tell a chat template: thinking, efforts in its own words, and variables of the caller's."""

import pytest

from mlx_qwen.errors import PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt.effort import template_variables, thinking_budget
from mlx_qwen.prompt.inputs import prompt_inputs
from tests.prompt.test_chat_template import HISTORY, QUESTION, processor, reference

# As Qwen3.8's template takes it.
THREE_WORDS = (
    "{%- set effort = reasoning_effort or 'xhigh' %}"
    "{%- if effort not in ['low', 'medium', 'xhigh'] %}{{ raise_exception('no such effort') }}{% endif -%}"
    "{{ effort }} {{ enable_thinking }}"
)
ANY_WORD = "Reasoning: {{ reasoning_effort }}{% if not add_generation_prompt %}.{% endif %}"
WORDS = {
    "none": "low False",
    "minimal": "low True",
    "low": "low True",
    "medium": "medium True",
    "high": "xhigh True",
    "xhigh": "xhigh True",
    "max": "xhigh True",
}
BUDGETS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 24576, "xhigh": None, "max": None}


def rendered(template: str | None, **options: object) -> str:
    one = processor() if template is None else processor(template)
    chosen = GenerationOptions(**options)  # type: ignore[arg-type]
    return one.decode(prompt_inputs(one, QUESTION, chosen).ids)


@pytest.mark.parametrize("effort", WORDS)
def test_an_effort_is_said_in_the_templates_nearest_word(effort: str) -> None:
    assert rendered(THREE_WORDS, reasoning_effort=effort) == WORDS[effort]
    assert rendered(ANY_WORD, reasoning_effort=effort) == f"Reasoning: {effort}"
    chosen = GenerationOptions(reasoning_effort=effort)  # type: ignore[arg-type]
    assert thinking_budget(processor(THREE_WORDS), chosen, max_tokens=10**6) is None


@pytest.mark.parametrize("effort", BUDGETS)
def test_without_a_word_for_it_an_effort_is_thinking_and_a_budget(effort: str) -> None:
    thinking = effort != "none"
    expected = reference().apply_chat_template(
        QUESTION, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert rendered(None, reasoning_effort=effort) == expected
    chosen = GenerationOptions(reasoning_effort=effort)  # type: ignore[arg-type]
    assert thinking_budget(processor(), chosen, max_tokens=10**6) == BUDGETS[effort]
    most = thinking_budget(processor(), chosen, max_tokens=1000)
    assert most == (None if BUDGETS[effort] is None else min(BUDGETS[effort] or 0, 500))


def test_what_is_said_outright_comes_before_an_effort() -> None:
    chosen = GenerationOptions(reasoning_effort="high", enable_thinking=False, thinking_budget=7)
    assert template_variables(processor(), chosen)["enable_thinking"] is False
    assert thinking_budget(processor(), chosen, max_tokens=10**6) == 7
    assert thinking_budget(processor(), GenerationOptions(), max_tokens=10**6) is None


def test_the_callers_variables_come_before_all_others() -> None:
    template = "{{ enable_thinking }} {{ colour }} {{ documents }} {{ preserve_thinking }}"
    own = {"enable_thinking": False, "colour": ["red"], "documents": [{"text": "<|im_end|>"}]}
    found = rendered(template, enable_thinking=True, preserve_thinking=True, chat_template_kwargs=own)
    assert found == "False ['red'] [{'text': '<|im_end|>'}] True"
    typed = prompt_inputs(processor(template), QUESTION, GenerationOptions(chat_template_kwargs=own)).ids
    assert not set(typed) & processor().end_token_ids


def test_a_variable_that_is_no_json_is_refused_by_its_name() -> None:
    with pytest.raises(PromptError, match="chat_template_kwargs 'when' holds a value of type object"):
        rendered("", chat_template_kwargs={"when": object()})


def test_an_answer_goes_on_with_the_last_message_when_asked() -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "It is"}]
    expected = reference().apply_chat_template(messages, tokenize=False, continue_final_message=True)
    one = processor()
    ids = prompt_inputs(one, messages, GenerationOptions(continue_final_message=True)).ids
    assert one.decode(ids) == expected
    assert not one.opens_thinking(ids)


@pytest.mark.parametrize("keeps", [True, False, None])
def test_earlier_reasoning_is_kept_where_that_is_chosen(keeps: bool | None) -> None:
    one = processor()
    ids = prompt_inputs(one, HISTORY, GenerationOptions(preserve_thinking=keeps)).ids
    assert ("A greeting." in one.decode(ids)) == bool(keeps)
