"""Examples as text: what chat_template.jinja makes of them, written out, as Jinja would take most of a batch's time."""

import json

from mlx_qwen.demo.tasks.example import Example, Message, call_text

END_OF_TEXT = "<|endoftext|>"
_TOOLS = (
    "<|im_start|>system\n# Tools\n\n<tools>{}\n</tools>\n\nCall a tool like this:\n\n<tool_call>\n<function=name>\n"
    "<parameter=key>\nvalue\n</parameter>\n</function>\n</tool_call><|im_end|>\n"
)
MEDIA = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


def render(example: Example) -> str:
    """The text of an example: its conversation as the chat template writes it, or its plain text and the end of it."""
    if not example.messages:
        return example.text + END_OF_TEXT
    last_question = max(i for i, message in enumerate(example.messages) if message["role"] == "user")
    described = "".join(f"\n{json.dumps(tool, ensure_ascii=False)}" for tool in example.tools)
    turns = [_turn(message, with_reasoning=i > last_question) for i, message in enumerate(example.messages)]
    return (_TOOLS.format(described) if example.tools else "") + "".join(turns)


def _turn(message: Message, *, with_reasoning: bool) -> str:
    if message["role"] == "tool":
        return f"<|im_start|>user\n<tool_response>\n{message['content']}\n</tool_response><|im_end|>\n"
    text = _content(message["content"])
    if message["role"] == "user":
        return f"<|im_start|>user\n{text}<|im_end|>\n"
    if with_reasoning:
        text = f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n{text}"
    return f"<|im_start|>assistant\n{text}{call_text(message.get('tool_calls'))}<|im_end|>\n"


def _content(content: object) -> str:
    if not isinstance(content, list):
        return str(content)
    return "".join(MEDIA.get(part["type"]) or part["text"] for part in content)
