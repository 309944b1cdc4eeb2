"""Chat prompts equal those of transformers' `apply_chat_template`."""

import json
from pathlib import Path

import pytest

from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate
from tests.support.tokenizers import CHAT_TEMPLATE, add_tokenizer, tiny_tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <Ort> & 'Zeit' 🌦",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "hourly": True}}}
QUESTION = [{"role": "user", "content": "  How warm is it?  "}]
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <there>"},
    {"role": "assistant", "content": "Hi!", "reasoning_content": "A greeting."},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "now?"}]},
]
TOOL_TURN = [
    *HISTORY,
    {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "20 degrees"},
    {"role": "tool", "content": "22 degrees"},
]
LANGUAGE_FEATURES = """
{%- for m in messages if m.role != 'system' %}
    {%- if loop.index0 > 3 %}{% break %}{% endif %}
{{ bos_token if bos_token is defined else '' }}[{{ m.role | upper }}] {{ m.content }}{{ eos_token }}
{% generation %}{%- set inner = 1 %}<a>{% endgeneration %}
{{ {'k': ["ü", '<', none, 1.5]} | tojson }} {{ m | tojson(indent=2, sort_keys=true) }} {{ inner is defined }}
    {%- endfor %}
{{ strftime_now('%Y') }}
"""


def processor(template: str | list[dict[str, str]] = CHAT_TEMPLATE) -> Processor:
    sources = {"default": template} if isinstance(template, str) else {t["name"]: t["template"] for t in template}
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return Processor(tiny_tokenizer(), template=ChatTemplate(sources, special), end_token_ids=frozenset({0, 2}))


def reference(template: str | list[dict[str, str]] = CHAT_TEMPLATE):
    from transformers import PreTrainedTokenizerFast

    named = template if isinstance(template, str) else {t["name"]: t["template"] for t in template}
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), chat_template=named, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", [QUESTION, HISTORY, TOOL_TURN], ids=["question", "history", "tool turn"])
@pytest.mark.parametrize(
    "flags",
    [{}, {"enable_thinking": True}, {"enable_thinking": False}, {"preserve_thinking": True}],
    ids=["default", "thinking", "direct", "preserved"],
)
def test_a_rendered_chat_equals_transformers(messages, tools, flags) -> None:
    expected = reference().apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=True, **flags
    )
    assert processor().apply_chat_template(messages, tools=tools, **flags) == expected


def test_without_a_generation_prompt_the_text_ends_with_the_last_message() -> None:
    expected = reference().apply_chat_template(HISTORY, tokenize=False, add_generation_prompt=False)
    assert processor().apply_chat_template(HISTORY, add_generation_prompt=False) == expected


@pytest.mark.parametrize("ending", ["It is", "It is ", "It is\n\n"])
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, "{% for m in messages %}<{{ m.content }}>\n{% endfor %}"])
def test_a_continued_message_stays_open_as_in_transformers(ending: str, template: str) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": ending}]
    expected = reference(template).apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert processor(template).apply_chat_template(messages, continue_final_message=True) == expected


def test_every_feature_that_templates_use_renders_as_in_transformers() -> None:
    messages = [{"role": "user", "content": f"<{i}> & é"} for i in range(6)]
    expected = reference(LANGUAGE_FEATURES).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert processor(LANGUAGE_FEATURES).apply_chat_template(messages) == expected


@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_named_templates_are_chosen_as_in_transformers(tools) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools | tojson }}"}]
    expected = reference(named).apply_chat_template(QUESTION, tools=tools, tokenize=False)
    assert processor(named).apply_chat_template(QUESTION, tools=tools) == expected


@pytest.mark.parametrize("place", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json", "list"])
def test_the_template_is_found_wherever_checkpoints_keep_it(tmp_path: Path, place: str) -> None:
    config = {}
    if place == "chat_template.jinja":
        (tmp_path / place).write_text("here")
    elif place == "chat_template.json":
        (tmp_path / place).write_text(json.dumps({"chat_template": "here"}))
    else:
        config = {"chat_template": "here" if place != "list" else [{"name": "default", "template": "here"}]}
    found = ChatTemplate.from_directory(tmp_path, config)
    assert found is not None
    assert found.source() == "here"


def test_a_checkpoint_without_a_template_says_so(tmp_path: Path) -> None:
    add_tokenizer(tmp_path, template=None)
    bare = Processor(tiny_tokenizer(), template=ChatTemplate.from_directory(tmp_path, {}), end_token_ids=frozenset())
    assert bare.chat_template is None
    with pytest.raises(CheckpointError, match="no chat template"):
        bare.apply_chat_template(QUESTION)


def test_what_a_template_refuses_is_reported_in_its_own_words() -> None:
    with pytest.raises(PromptError, match="only on Sundays"):
        processor("{{ raise_exception('only on Sundays') }}").apply_chat_template(QUESTION)


def test_a_template_cannot_leave_the_sandbox() -> None:
    with pytest.raises(PromptError, match="refused"):
        processor("{{ messages.__class__.__mro__[1].__subclasses__() }}").apply_chat_template(QUESTION)


def test_a_broken_template_is_reported_with_its_line() -> None:
    with pytest.raises(CheckpointError, match="line 2"):
        processor("a\n{% if %}").apply_chat_template(QUESTION)
