"""Brings each form of prompt to token ids, and checks that they fit the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_qwen.config import TextConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Message, Messages
from mlx_qwen.media.grids import Kind
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.effort import template_variables
from mlx_qwen.prompt.media_parts import Media, message_media, with_media
from mlx_qwen.prompt.placed import Placed, check_sight, place_media
from mlx_qwen.prompt.shapes import standard_messages

if TYPE_CHECKING:
    from mlx_qwen.media.patches import Patches

# Text as it stands, token ids (a list or an array [T] or [1, T]), or chat messages for the template.
Prompt: TypeAlias = str | Sequence[int] | mx.array | npt.NDArray[np.integer] | Messages

_NO_PROMPT = (
    "The prompt is neither text, nor one row of token ids, nor a list of chat messages (dictionaries). "
    "batch_generate takes several prompts."
)


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """A prompt as the model reads it: token ids, and the images and videos that its placeholders stand for."""

    ids: list[int]
    media: tuple[Placed, ...] = ()

    @property
    def images(self) -> "Patches | None":
        """Patches of all images, or None when there are none."""
        return self._patches(Kind.IMAGE)

    @property
    def videos(self) -> "Patches | None":
        """Patches of all videos, or None when there are none."""
        return self._patches(Kind.VIDEO)

    def after(self, tokens: int) -> "PromptInputs":
        """What is left of the prompt behind its first `tokens` tokens."""
        later = (replace(one, start=one.start - tokens) for one in self.media if one.start >= tokens)
        return PromptInputs(self.ids[tokens:], tuple(later))

    def _patches(self, kind: Kind) -> "Patches | None":
        from mlx_qwen.media.patches import joined

        parts = [one.patches for one in self.media if one.kind is kind]
        return joined(parts) if parts else None


def prompt_tokens(processor: Processor, prompt: Prompt, options: GenerationOptions) -> list[int]:
    """Token ids of a prompt; raises PromptError when it is empty or of no known form."""
    return prompt_inputs(processor, prompt, options).ids


def prompt_inputs(processor: Processor, prompt: Prompt, options: GenerationOptions) -> PromptInputs:
    """Token ids, images and videos of a prompt.

    Images and videos are those of its messages, or of `options`: in front of the last user's words in chat messages,
    at the placeholders in any other prompt. Raises PromptError when it is empty or of no known form, an image or video
    cannot be read, or they do not match the placeholders.
    """
    media = [Media(Kind.IMAGE, image) for image in options.images or ()]
    media += [Media(Kind.VIDEO, video) for video in options.videos or ()]
    messages: list[Message] = []
    if isinstance(prompt, str):
        ids = processor.encode(prompt)
    else:
        listed = _listed(prompt)
        ids = [int(item) for item in listed if isinstance(item, int | np.integer) and not isinstance(item, bool)]
        messages = [cast(Message, item) for item in listed if isinstance(item, Mapping) or hasattr(item, "model_dump")]
        if len(listed) not in (len(ids), len(messages)):
            raise PromptError(_NO_PROMPT)
        if messages:
            chat: Messages = standard_messages(messages)
            chat = with_media(chat, media) if media else chat
            check_sight(processor, chat)
            media = message_media(chat)
            ids = processor.chat_ids(
                chat,
                tools=options.tools,
                variables=template_variables(processor, options),
                continue_final_message=options.continue_final_message,
            )
    if not ids:
        raise PromptError("The prompt is empty; give at least one token to continue from.")
    return PromptInputs(*place_media(processor, ids, media, options.media_limits, rendered=bool(messages)))


def _listed(prompt: object) -> Sequence[object]:
    """The ids or messages of a prompt; an array holds one row of ids, [T] or [1, T]."""
    if isinstance(prompt, mx.array | np.ndarray):
        row = prompt[0] if prompt.ndim == 2 and len(prompt) == 1 else prompt
        prompt = row.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise PromptError(_NO_PROMPT)
    return prompt


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
