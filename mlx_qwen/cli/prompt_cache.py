"""A prompt that is read once and asked about often: `cache-prompt` writes its state, `generate` goes on from it."""

from collections.abc import Sequence

from mlx_qwen.errors import PromptError
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor

# Stands for the question in the template's text, which is cut there, as mlx-lm does.
_QUESTION = "<the question>"


def beginning(processor: Processor, text: str, system_prompt: str | None, options: GenerationOptions) -> list[int]:
    """Token ids of a user's message that begins with `text` and goes on."""
    return processor.encode(_around(processor, system_prompt, options)[0] + text)


def rest(processor: Processor, question: str, options: GenerationOptions) -> list[int]:
    """Token ids of the question at the end of that message, and of what lets the model answer."""
    return processor.encode(question + _around(processor, None, options)[1])


def _around(processor: Processor, system_prompt: str | None, options: GenerationOptions) -> Sequence[str]:
    """What the chat template writes before and behind a question; nothing where there is no template."""
    if processor.chat_template is None:
        return ("", "")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    thinking = options.enable_thinking
    rendered = processor.apply_chat_template(
        [*system, {"role": "user", "content": _QUESTION}],
        tools=options.tools,
        enable_thinking=processor.default_thinking if thinking is None else thinking,
    )
    parts = rendered.split(_QUESTION)
    if len(parts) != 2:
        raise PromptError("This chat template changes what it is given, so that no prompt can be cached with it.")
    return parts
