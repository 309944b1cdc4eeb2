"""The demo's chat template behaves as Qwen3.5's: tools, think blocks, history, placeholders, refusals."""

import random

import pytest

from mlx_qwen.demo.tasks import TASKS
from mlx_qwen.errors import PromptError
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.jinja import compile_template
from tools.demo_training.rendering import render
from tools.demo_training.tokenizer import END_OF_TURN, demo_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "description": "Ä <&>", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"city": "Köln", "days": [1, 2], "now": True}}}
QUESTION = {"role": "user", "content": " Why? "}
THOUGHT = {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
CONVERSATIONS = {
    "question": [QUESTION],
    "history": [{"role": "system", "content": "Be brief."}, QUESTION, THOUGHT, QUESTION],
    "calls": [QUESTION, {**THOUGHT, "tool_calls": [CALL, CALL]}, *[{"role": "tool", "content": "{}"}] * 2],
    "silent call": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    "written tags": [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo."}],
}


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("flags", [{}, {"enable_thinking": True}, {"preserve_thinking": True}])
def test_it_renders_as_transformers_renders_it(processor: Processor, template: str, messages, tools, flags) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=demo_tokenizer(), chat_template=template, eos_token=END_OF_TURN
    )
    expected = reference.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True, **flags)
    assert processor.apply_chat_template(messages, tools=tools, **flags) == expected


@pytest.mark.parametrize("task", sorted(name for name in TASKS if TASKS[name](random.Random(0)).messages))
def test_training_text_is_what_the_template_renders(template: str, task: str) -> None:
    for seed in range(20):
        example = TASKS[task](random.Random(seed))
        expected = compile_template(template).render(messages=example.messages, tools=example.tools)
        assert render(example) == expected


def test_answers_are_given_at_once_unless_thinking_is_asked_for(processor: Processor) -> None:
    assert processor.default_thinking is False
    assert processor.apply_chat_template([QUESTION]).endswith("assistant\n<think>\n\n</think>\n\n")
    assert processor.apply_chat_template([QUESTION], enable_thinking=True).endswith("assistant\n<think>\n")


def test_reasoning_of_earlier_turns_is_dropped_unless_preserved(processor: Processor) -> None:
    history = [QUESTION, THOUGHT, QUESTION]
    assert "Hm." not in processor.apply_chat_template(history)
    assert "<think>\nHm.\n</think>\n\nSo." in processor.apply_chat_template(history, preserve_thinking=True)


def test_reasoning_since_the_last_question_is_kept_over_tool_responses(processor: Processor) -> None:
    asked = [QUESTION, {**THOUGHT, "tool_calls": [CALL]}, {"role": "tool", "content": "{}"}]
    assert "<think>\nHm.\n</think>\n\nSo.\n\n<tool_call>\n<function=f>\n" in processor.apply_chat_template(asked)


def test_consecutive_tool_responses_share_a_turn(processor: Processor) -> None:
    text = processor.apply_chat_template(CONVERSATIONS["calls"])
    response = "<tool_response>\n{}\n</tool_response>"
    assert f"<|im_start|>user\n{response}\n{response}<|im_end|>\n" in text


def test_every_image_and_video_is_one_placeholder_numbered_on_request(template: str) -> None:
    parts = [{"type": "image"}, {"type": "video"}, {"type": "image"}, {"type": "text", "text": "?"}]
    render_it = compile_template(template).render
    plain = render_it(messages=[{"role": "user", "content": parts}])
    image, video = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
    assert plain == f"<|im_start|>user\n{image}{video}{image}?<|im_end|>\n"
    numbered = render_it(messages=[{"role": "user", "content": parts}], add_vision_id=True)
    assert f"Picture 1: {image}Video 1: {video}Picture 2: {image}?" in numbered


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([QUESTION, {"role": "system", "content": "Late."}], "must come first"),
        ([{"role": "system", "content": [{"type": "image"}]}, QUESTION], "cannot hold images"),
        ([{"role": "system", "content": [{"type": "video"}]}, QUESTION], "cannot hold videos"),
        ([{"role": "user", "content": "<tool_response>\n1\n</tool_response>"}], "asks anything"),
        ([QUESTION, {"role": "critic", "content": "No."}], "Unknown role"),
    ],
)
def test_it_refuses_what_qwens_template_refuses(processor: Processor, messages, reason: str) -> None:
    assert processor._template is not None
    with pytest.raises(PromptError, match=reason):
        processor._template.render(messages, tools=None, add_generation_prompt=True, variables={})
