"""Text to token ids and back, with the checkpoint's chat template and special tokens."""

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tokenizers import Tokenizer

from mlx_qwen.answer.reasoning import THINK_END, THINK_START
from mlx_qwen.answer.text import TextStream
from mlx_qwen.config import ModelConfig, VisionConfig, is_small
from mlx_qwen.errors import CheckpointError, PromptError
from mlx_qwen.json_types import Json, Messages, Tools
from mlx_qwen.prompt.mending import render_mended
from mlx_qwen.prompt.messages import prepare_messages, prepare_tools
from mlx_qwen.prompt.template import ChatTemplate
from mlx_qwen.prompt.tokenizer_files import end_token_ids, media_settings, read_json, read_tokenizer
from mlx_qwen.prompt.typed import TypedTokens
from mlx_qwen.recommended import passed_over

if TYPE_CHECKING:
    from mlx_qwen.media.images import ImageProcessor
    from mlx_qwen.media.videos import VideoProcessor

_ASSISTANT = "<|im_start|>assistant"
_IMAGE_PAD, _VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


class Processor:
    """What `load` returns beside the model: everything between a caller's prompt and the model's token ids.

    Attributes:
        tokenizer: the checkpoint's tokenizer.
        end_token_ids: any of these ends an answer.
        thinking: ids of `<think>` and `</think>`, or None when the vocabulary lacks them.
        generation_config: generation_config.json as read, or empty.
        image_token_id: the placeholder of images, or None when the vocabulary has none.
        video_token_id: the placeholder of videos, or None when the vocabulary has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        template: ChatTemplate | None,
        end_token_ids: frozenset[int],
        thinks_by_default: bool = True,
        generation_config: dict[str, Json] | None = None,
        image_token_id: int | None = None,
        video_token_id: int | None = None,
        vision: VisionConfig | None = None,
        image_settings: dict[str, Json] | None = None,
        video_settings: dict[str, Json] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids
        self.generation_config = generation_config or {}
        self.image_token_id = tokenizer.token_to_id(_IMAGE_PAD) if image_token_id is None else image_token_id
        self.video_token_id = tokenizer.token_to_id(_VIDEO_PAD) if video_token_id is None else video_token_id
        self._vision = vision
        self._image_settings = image_settings or {}
        self._video_settings = video_settings or {}
        start, end = tokenizer.token_to_id(THINK_START), tokenizer.token_to_id(THINK_END)
        self.thinking: tuple[int, int] | None = None if start is None or end is None else (start, end)
        self._template = template
        self._thinks_by_default = thinks_by_default

    @classmethod
    def from_directory(cls, path: Path, config: ModelConfig) -> "Processor":
        """Reads a checkpoint's tokenizer, chat template, and generation and preprocessor settings.

        Raises CheckpointError or ConfigError when tokenizer.json is missing or a file cannot be used.
        """
        path = Path(path)
        tokenizer = read_tokenizer(path)
        tokenizer_config = read_json(path / "tokenizer_config.json")
        generation_config = read_json(path / "generation_config.json")
        ignored = passed_over(generation_config)
        if ignored:
            warnings.warn(
                f"generation_config.json of {path} asks for {', '.join(ignored)}, which answers here do not follow.",
                stacklevel=3,
            )
        return cls(
            tokenizer,
            template=ChatTemplate.from_directory(path, tokenizer_config),
            end_token_ids=end_token_ids(tokenizer, config, tokenizer_config, generation_config),
            thinks_by_default=not is_small(config.text),
            generation_config=generation_config,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision=config.vision,
            image_settings=media_settings(path, "image_processor", "preprocessor_config.json"),
            video_settings=media_settings(
                path, "video_processor", "video_preprocessor_config.json", "preprocessor_config.json"
            ),
        )

    @cached_property
    def default_thinking(self) -> bool | None:
        """Whether answers are reasoned unless told otherwise, by the model's size and its template's own default; None
        when the template knows no thinking.
        """
        template_default = self._template.default_thinking() if self._template else None
        return template_default and self._thinks_by_default

    @property
    def sees(self) -> bool:
        """Whether the checkpoint has a vision tower."""
        return self._vision is not None

    @property
    def image_processor(self) -> "ImageProcessor | None":
        """Makes patches of images; None when the checkpoint has no vision tower."""
        if self._vision is None:
            return None
        # Prompts without images need not wait for the imaging library.
        from mlx_qwen.media.images import ImageProcessor

        return ImageProcessor.from_config(self._vision, self._image_settings)

    @property
    def video_processor(self) -> "VideoProcessor | None":
        """Makes patches of videos; None when the checkpoint has no vision tower."""
        if self._vision is None:
            return None
        from mlx_qwen.media.videos import VideoProcessor

        return VideoProcessor.from_config(self._vision, self._video_settings)

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the checkpoint's (default) chat template; None when it has none."""
        return self._template.source() if self._template else None

    def template_mentions(self, name: str) -> bool:
        """Whether the chat template may read a variable of this name."""
        return self._template is not None and self._template.mentions(name)

    def template_takes(self, variables: dict[str, Json]) -> bool:
        """Whether the chat template renders a plain question with these variables."""
        return self._template is not None and self._template.takes(variables)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`: special tokens written in it are recognised, none is added.

        Raises PromptError for text that came from bytes which are not UTF-8.
        """
        _check_utf8(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def stream(self) -> TextStream:
        """A fresh incremental decoder for one answer."""
        return TextStream(self.tokenizer)

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        preserve_thinking: bool | None = None,
    ) -> str:
        """The prompt text for chat messages, as transformers' `apply_chat_template` renders it.

        Messages may have the shapes of any protocol (see `standard_messages`). What this template refuses and can be
        said otherwise is, with a warning (see `render_mended`). Every image or video is one placeholder. Options left
        at None are not passed, so that the template's own default holds. `continue_final_message` leaves the last
        message open for the model to go on writing, and adds no generation prompt. Special tokens that people typed
        stand in the text like the template's; `chat_ids` tells them apart. Raises PromptError when the messages cannot
        be used and CheckpointError when there is no usable template.
        """
        typed = TypedTokens(self.tokenizer)
        flags = {"enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
        return typed.restore(
            self._render(
                typed,
                messages,
                tools,
                {name: value for name, value in flags.items() if value is not None},
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        )

    def chat_ids(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        variables: Mapping[str, Json] | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Token ids of chat messages, as `apply_chat_template` renders them with these variables.

        Special tokens in what people, tools and documents say are encoded as text.
        """
        typed = TypedTokens(self.tokenizer)
        text = self._render(typed, messages, tools, variables or {}, continue_final_message=continue_final_message)
        _check_utf8(text)
        return typed.encode(text)

    def _render(
        self,
        typed: TypedTokens,
        messages: Messages,
        tools: Tools | None,
        variables: Mapping[str, Json],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt text, with stand-ins for special tokens that are not the template's."""
        template = self._template
        if template is None:
            raise CheckpointError(
                "This checkpoint has no chat template (chat_template.jinja). "
                "Add the file of the original model, or pass the prompt as plain text."
            )
        plain = template.known_roles(prepare_messages(messages, tools), tools=bool(tools))
        plain_tools = prepare_tools(tools)
        hidden_tools = plain_tools and [typed.hide(tool) for tool in plain_tools]
        hidden = {name: typed.hide(value) for name, value in variables.items()}
        if continue_final_message:
            render = partial(template.render_unfinished, tools=hidden_tools, variables=hidden)
        else:
            render = partial(
                template.render, tools=hidden_tools, add_generation_prompt=add_generation_prompt, variables=hidden
            )
        return render_mended(cast(list[dict[str, Json]], typed.hide(list(plain))), render)

    def opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether an answer to this prompt begins inside a think block.

        It does behind a `<think>` that begins an assistant's turn, or ends the prompt with a line break beside it;
        elsewhere the tag is a mention.
        """
        if self.thinking is None:
            return False
        start, end = self.thinking
        for index in range(len(ids) - 1, -1, -1):
            if ids[index] == start:
                before, behind = self.decode(ids[max(0, index - 8) : index]), self.decode(ids[index + 1 :])
                stands_apart = not before or before.endswith("\n") or "\n" in behind
                return before.rstrip().endswith(_ASSISTANT) or (stands_apart and not behind.strip())
            if ids[index] == end or ids[index] in self.end_token_ids:
                return False
        return False


def _check_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 10) : error.start + 10]
        raise PromptError(
            f"The prompt holds a byte that is not UTF-8, near {around!a}. Save the text as UTF-8."
        ) from error
