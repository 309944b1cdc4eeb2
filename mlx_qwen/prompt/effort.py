"""What a template is told beside messages and tools: thinking, effort, and the caller's own variables."""

from mlx_qwen.json_types import Json
from mlx_qwen.options import EFFORT_BUDGETS, GenerationOptions
from mlx_qwen.prompt.messages import plain_json
from mlx_qwen.prompt.processor import Processor

# The words by which a template may know an effort, the nearest first.
_WORDS = {
    "none": ("none", "minimal", "low"),
    "minimal": ("minimal", "low"),
    "low": ("low", "minimal"),
    "medium": ("medium",),
    "high": ("high", "xhigh", "max"),
    "xhigh": ("xhigh", "max", "high"),
    "max": ("max", "xhigh", "high"),
}


def template_variables(processor: Processor, options: GenerationOptions) -> dict[str, Json]:
    """The variables of the chat template that options choose; `chat_template_kwargs` come before all others."""
    effort, thinking = options.reasoning_effort, options.enable_thinking
    if thinking is None:
        thinking = processor.default_thinking if effort is None else effort != "none"
    chosen: dict[str, Json] = {
        "enable_thinking": thinking,
        "preserve_thinking": options.preserve_thinking,
        "reasoning_effort": None if effort is None else _known_word(processor, effort),
    }
    told = {name: value for name, value in chosen.items() if value is not None}
    own = options.chat_template_kwargs or {}
    return {**told, **{name: plain_json(value, f"chat_template_kwargs {name!r}") for name, value in own.items()}}


def thinking_budget(processor: Processor, options: GenerationOptions, *, max_tokens: int) -> int | None:
    """Most tokens of reasoning: as options say, or as the effort means for a template that has no word for it."""
    effort = options.reasoning_effort
    if options.thinking_budget is not None or effort is None or processor.thinking is None:
        return options.thinking_budget
    most = EFFORT_BUDGETS.get(effort)
    if most is None or "reasoning_effort" in template_variables(processor, options):
        return None
    return min(most, max_tokens // 2)


def _known_word(processor: Processor, effort: str) -> str | None:
    """The word for an effort that the template takes; None where it does not ask for any."""
    if not processor.template_mentions("reasoning_effort"):
        return None
    return next((word for word in _WORDS[effort] if processor.template_takes({"reasoning_effort": word})), None)
