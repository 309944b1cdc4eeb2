"""Brings each form of prompt to token ids, and checks that they fit the model."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import mlx.core as mx

from mlx_qwen.config import TextConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.generation.options import GenerationOptions
from mlx_qwen.prompt import Messages, Processor

# Text as it stands, token ids (a list or an array [n]), or chat messages for the template.
Prompt: TypeAlias = str | Sequence[int] | mx.array | Messages


def prompt_tokens(processor: Processor, prompt: Prompt, options: GenerationOptions) -> list[int]:
    """Token ids of a prompt; raises PromptError when it is empty or of no known form."""
    if isinstance(prompt, str):
        ids = processor.encode(prompt)
    else:
        items = prompt.tolist() if isinstance(prompt, mx.array) else prompt
        listed = items if isinstance(items, Sequence) else [items]
        ids = [item for item in listed if isinstance(item, int)]
        messages = [item for item in listed if isinstance(item, Mapping)]
        if listed is not items or len(listed) not in (len(ids), len(messages)):
            raise PromptError("The prompt is neither text, nor token ids, nor a list of chat messages (dictionaries).")
        if messages:
            ids = processor.encode(_rendered(processor, messages, options))
    if not ids:
        raise PromptError("The prompt is empty; give at least one token to continue from.")
    return ids


def check_fits(ids: Sequence[int], text: TextConfig, *, cached: int = 0) -> None:
    """Raises PromptError for ids outside of the vocabulary or more tokens than the model has positions for."""
    limit = text.max_position_embeddings
    if cached + len(ids) > limit:
        seen = f" after {cached:,} in the cache" if cached else ""
        raise PromptError(
            f"The prompt has {len(ids):,} tokens{seen}, but this model's context ends at {limit:,}. "
            "Shorten the prompt or split it into parts."
        )
    wrong = next((token for token in ids if not 0 <= token < text.vocab_size), None)
    if wrong is not None:
        raise PromptError(f"Token id {wrong} is outside of the vocabulary (0 to {text.vocab_size - 1}).")


def room_for_answer(ids: Sequence[int], text: TextConfig, max_tokens: int, *, cached: int = 0) -> int:
    """How many tokens may be generated: max_tokens, or fewer where the context ends before, but always one."""
    return max(1, min(max_tokens, text.max_position_embeddings - cached - len(ids)))


def _rendered(processor: Processor, messages: Messages, options: GenerationOptions) -> str:
    thinking = options.enable_thinking
    return processor.apply_chat_template(
        messages,
        tools=options.tools,
        enable_thinking=processor.default_thinking if thinking is None else thinking,
        preserve_thinking=options.preserve_thinking,
    )
