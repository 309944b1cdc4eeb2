"""Brings each form of prompt to token ids, and checks that they fit the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.config import TextConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.generation.options import GenerationOptions
from mlx_qwen.prompt import Messages, Processor
from mlx_qwen.prompt.media import expand_placeholders, message_images, with_images

if TYPE_CHECKING:
    from mlx_qwen.prompt.image_sources import ImageSource
    from mlx_qwen.prompt.images import Patches

# Text as it stands, token ids (a list or an array [T] or [1, T]), or chat messages for the template.
Prompt: TypeAlias = str | Sequence[int] | mx.array | npt.NDArray[np.integer] | Messages

_NO_PROMPT = (
    "The prompt is neither text, nor one row of token ids, nor a list of chat messages (dictionaries). "
    "batch_generate takes several prompts."
)


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """A prompt as the model reads it: token ids, and the images that its placeholders stand for."""

    ids: list[int]
    images: "Patches | None" = None


def prompt_tokens(processor: Processor, prompt: Prompt, options: GenerationOptions) -> list[int]:
    """Token ids of a prompt; raises PromptError when it is empty or of no known form."""
    return prompt_inputs(processor, prompt, options).ids


def prompt_inputs(processor: Processor, prompt: Prompt, options: GenerationOptions) -> PromptInputs:
    """Token ids and images of a prompt.

    Images are those of its messages, or `options.images`: in front of the last user's words in chat messages, at the
    placeholders in any other prompt. Raises PromptError when it is empty or of no known form, an image cannot be read,
    or images and placeholders do not match.
    """
    images = list(options.images or ())
    if isinstance(prompt, str):
        ids = processor.encode(prompt)
    else:
        listed = _listed(prompt)
        ids = [int(item) for item in listed if isinstance(item, int | np.integer) and not isinstance(item, bool)]
        messages = [item for item in listed if isinstance(item, Mapping)]
        if len(listed) not in (len(ids), len(messages)):
            raise PromptError(_NO_PROMPT)
        if messages:
            chat = with_images(messages, images) if images else messages
            images = message_images(chat)
            ids = processor.encode(_rendered(processor, chat, options))
    if not ids:
        raise PromptError("The prompt is empty; give at least one token to continue from.")
    return _with_patches(processor, ids, images, options)


def _listed(prompt: object) -> Sequence[object]:
    """The ids or messages of a prompt; an array holds one row of ids, [T] or [1, T]."""
    if isinstance(prompt, mx.array | np.ndarray):
        row = prompt[0] if prompt.ndim == 2 and len(prompt) == 1 else prompt
        prompt = row.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptError(_NO_PROMPT)
    return prompt


def _with_patches(
    processor: Processor, ids: list[int], images: "list[ImageSource]", options: GenerationOptions
) -> PromptInputs:
    """Decode the images and give each as many placeholders as it has features."""
    if not images and processor.image_token_id not in ids:
        return PromptInputs(ids)
    preparing = processor.image_processor
    if preparing is None or processor.image_token_id is None:
        raise PromptError(
            "The prompt holds an image, but this checkpoint is for text only. Use a checkpoint with a vision tower, or "
            "describe the image in words."
        )
    preparing = preparing.limited(min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    patches = preparing(images) if images else None
    grids = patches.grids if patches else ()
    return PromptInputs(
        expand_placeholders(ids, grids, token=processor.image_token_id, merge=preparing.merge_size), patches
    )


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
