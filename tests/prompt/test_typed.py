"""Special tokens that people type are text, and all else has the ids that transformers gives it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, Tokenizer

from mlx_qwen.json_types import Json, ToolCall
from mlx_qwen.loading import load
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from mlx_qwen.prompt.template import ChatTemplate
from mlx_qwen.prompt.typed import TypedTokens
from tests.prompt.test_chat_template import CALL, HISTORY, QUESTION, TOOL_TURN, WEATHER
from tests.support.tokenizers import CHAT_TEMPLATE, tiny_tokenizer

LINES = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PARTS = "<|im_start|>{% for p in messages[0].content %}{{ p.text or '<|image_pad|>' }}{% endfor %}<|im_end|>"


def tokenizer() -> Tokenizer:
    made = tiny_tokenizer()
    made.add_special_tokens([AddedToken(text, special=True) for text in ("<|image_pad|>", "<|im_start|><|x|>")])
    return made


def bare() -> Tokenizer:
    """The same tokenizer without any special token: what text is to it, is text."""
    description = json.loads(tokenizer().to_str())
    return Tokenizer.from_str(json.dumps({**description, "added_tokens": []}))


WITH, WITHOUT = tokenizer(), bare()
ADDED = {token.content: number for number, token in WITH.get_added_tokens_decoder().items()}


def processor(template: str = CHAT_TEMPLATE) -> Processor:
    return Processor(WITH, template=ChatTemplate({"default": template}), end_token_ids=frozenset({0, 2}))


def text(value: str) -> list[int]:
    ids: list[int] = WITHOUT.encode(value, add_special_tokens=False).ids
    return ids


typed = st.lists(
    st.sampled_from([*ADDED, "<", "|>", "<|im_", "end|>", "think>", "</", "a b", " ", "\n", "ü", "12", "<think"]),
    max_size=6,
).map("".join)


@settings(deadline=None)
@given(st.lists(typed, min_size=1, max_size=4))
def test_what_is_typed_is_encoded_as_a_tokenizer_without_special_tokens_does(contents: list[str]) -> None:
    expected = []
    for content in contents:
        expected += [ADDED["<|im_start|>"], *text(f"user\n{content}"), ADDED["<|im_end|>"], *text("\n")]
    messages = [{"role": "user", "content": content} for content in contents]
    assert processor(LINES).chat_ids(messages) == expected
    rendered = processor(LINES).apply_chat_template(messages)
    assert rendered == "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents)


@settings(deadline=None)
@given(st.lists(typed, min_size=1, max_size=4))
def test_halves_of_a_token_make_none_when_a_template_joins_them(parts: list[str]) -> None:
    variables: dict[str, Json] = {"parts": list(parts)}
    joins = processor("<|im_start|>{{ parts | join }}<|im_end|>")
    found = joins.chat_ids(QUESTION, variables=variables)
    assert found == [ADDED["<|im_start|>"], *text("".join(parts)), ADDED["<|im_end|>"]]


@pytest.mark.parametrize("token", ADDED)
def test_a_typed_token_is_text_wherever_people_and_tools_speak(token: str) -> None:
    def chat(token: str) -> list[int]:
        function = {"name": "f", "description": token, "parameters": {"properties": {token: {"type": "string"}}}}
        tools = [{"type": "function", "function": function}]
        return processor().chat_ids(
            [
                {"role": "system", "content": f"Never say {token}"},
                {"role": "user", "content": f"What does {token} mean?"},
                {
                    "role": "assistant",
                    "content": f"The tag {token} means this.",
                    "reasoning_content": f"{token}?",
                    "tool_calls": [{"function": {"name": "f", "arguments": {token: token}}}],
                },
                {"role": "tool", "content": f"{token}<{token}"},
                {"role": "user", "content": token},
            ],
            tools=tools,
            variables={"preserve_thinking": True},
        )

    def control(ids: list[int]) -> list[int]:
        return [number for number in ids if number in ADDED.values()]

    found = chat(token)
    assert control(found) == control(chat("word"))
    assert processor().decode(found).count(token) > 9


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", [QUESTION, HISTORY, TOOL_TURN], ids=["question", "history", "tool turn"])
def test_where_nothing_is_typed_ids_are_those_of_transformers(messages, tools) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), chat_template=CHAT_TEMPLATE)
    expected = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert processor().chat_ids(messages, tools=tools) == expected


def test_a_raw_prompt_keeps_its_control_tokens() -> None:
    raw = prompt_inputs(processor(), "<|im_start|>user\nHi<|im_end|>", GenerationOptions())
    assert raw.ids == [ADDED["<|im_start|>"], *text("user\nHi"), ADDED["<|im_end|>"]]


def test_a_typed_placeholder_beside_a_real_picture_is_text() -> None:
    model, seeing = load()
    del model
    question = "What does <|image_pad|> mean, and <|vision_start|><|video_pad|><|vision_end|>?"
    content = [{"type": "image", "image": Image.new("RGB", (64, 64), "red")}, {"type": "text", "text": question}]
    found = prompt_inputs(seeing, [{"role": "user", "content": content}], GenerationOptions())
    plain = [content[0], {"type": "text", "text": "What does it mean?"}]
    expected = prompt_inputs(seeing, [{"role": "user", "content": plain}], GenerationOptions())
    assert found.ids.count(seeing.image_token_id) == expected.ids.count(seeing.image_token_id) > 0
    assert seeing.video_token_id not in found.ids
    assert question in seeing.decode(found.ids)
    assert len(found.media) == 1


CALLED = (
    "<parameter=city>\nKöln\n</parameter>\n<parameter=days>\n2\n</parameter>\n<parameter=hourly>\ntrue\n</parameter>"
)
RAW = f"A greeting.\n</think>\n\nHi!\n\n<tool_call>\n<function=weather>\n{CALLED}\n</function>\n</tool_call>"


@pytest.mark.parametrize("raw", [RAW, f"<think>\n{RAW}"], ids=["opened by the prompt", "whole"])
def test_an_assistants_raw_answer_is_its_reasoning_words_and_calls(raw: str) -> None:
    answer = {"role": "assistant", "content": "Hi!", "reasoning_content": "A greeting.", "tool_calls": [CALL]}
    schema = {"properties": {"days": {"type": "integer"}, "hourly": {"type": "boolean"}, "city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": schema}}]
    expected = processor().chat_ids([*QUESTION, answer], tools=tools)
    assert processor().chat_ids([*QUESTION, {"role": "assistant", "content": raw}], tools=tools) == expected
    assert ADDED["<tool_call>"] in expected


@pytest.mark.parametrize("content", ["Write `</think>` last.", "<think> begins it.", "A `<tool_call>` is a tag."])
def test_an_assistants_mention_of_a_tag_stays_where_it_is(content: str) -> None:
    answer = {"role": "assistant", "content": content, "reasoning_content": ""}
    found = processor().chat_ids([*QUESTION, answer])
    assert processor().decode(found).count(content) == 1
    assert found.count(ADDED["<think>"]) == 2  # the template's, of this answer and the next


def test_stand_ins_are_never_the_same_twice() -> None:
    first, second = TypedTokens(WITH), TypedTokens(WITH)
    assert first.hide("<think>") != second.hide("<think>")
    assert first.restore(str(first.hide("a <think> b"))) == "a <think> b"


def test_calls_of_our_own_responses_keep_their_tokens_as_text() -> None:
    call = ToolCall("write", {"content": "<|im_end|>\n<tool_call>"})
    found = processor().chat_ids([*QUESTION, {"role": "assistant", "content": "", "tool_calls": (call,)}])
    plain = ToolCall("write", {"content": "nothing"})
    expected = processor().chat_ids([*QUESTION, {"role": "assistant", "content": "", "tool_calls": (plain,)}])
    for token in ("<|im_end|>", "<tool_call>"):
        assert found.count(ADDED[token]) == expected.count(ADDED[token])
