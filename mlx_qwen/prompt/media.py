"""Images in chat messages, and their placeholders in the prompt's token ids."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from mlx_qwen.errors import PromptError
from mlx_qwen.grids import Grid
from mlx_qwen.prompt.json_types import Json, Message, Messages

if TYPE_CHECKING:
    from mlx_qwen.prompt.image_sources import ImageSource

_IMAGE_KINDS = ("image", "image_url", "input_image")
_OTHER_MEDIA = ("video", "video_url", "audio", "input_audio")
IMAGE_PART: Json = {"type": "image"}


def is_image(part: object, where: str) -> bool:
    """Whether a content part is an image; raises PromptError for video and audio, which this version does not read."""
    kind = _kind(part)
    if kind in _OTHER_MEDIA:
        raise PromptError(
            f"{where} holds {kind} content; this version reads text and images. Pass a video as a few images of its "
            "frames."
        )
    return kind in _IMAGE_KINDS


def message_images(messages: Messages) -> list["ImageSource"]:
    """The images of all messages, in order; raises PromptError for an image part without an image."""
    found = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else ()
        found += [_source(part, f"Message {index}") for part in parts if _kind(part) in _IMAGE_KINDS]
    return found


def with_images(messages: Messages, images: Sequence["ImageSource"]) -> list[Message]:
    """The messages, with images in front of the last user's words; raises PromptError when no user speaks."""
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if last is None:
        raise PromptError('Images need a message with role "user" to stand in; add one that asks about them.')
    content = messages[last].get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [*({"type": "image", "image": image} for image in images), *cast(Sequence[object], text or ())]
    return [*messages[:last], {**messages[last], "content": parts}, *messages[last + 1 :]]


def expand_placeholders(ids: Sequence[int], grids: Sequence[Grid], *, token: int, merge: int) -> list[int]:
    """Token ids with as many placeholders `token` for each image as it has features.

    Raises PromptError unless there is one placeholder an image, or already one a feature.
    """
    sizes = [grid.tokens(merge) for grid in grids]
    found = list(ids).count(token)
    if found == sum(sizes):
        return list(ids)
    if found != len(sizes):
        raise PromptError(
            f"The prompt has {found:,} image placeholders and {len(sizes)} images were given, expected one for each. "
            "Put <|vision_start|><|image_pad|><|vision_end|> where an image belongs, or pass chat messages."
        )
    coming = iter(sizes)
    return [copy for known in ids for copy in [known] * (next(coming) if known == token else 1)]


def _kind(part: object) -> object:
    if not isinstance(part, Mapping):
        return None
    return part.get("type") or next((kind for kind in (*_IMAGE_KINDS, *_OTHER_MEDIA) if kind in part), None)


def _source(part: Mapping[str, object], where: str) -> "ImageSource":
    source = next((part[kind] for kind in (*_IMAGE_KINDS, "url", "path") if part.get(kind) is not None), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise PromptError(
            f'{where} has an image part without an image; expected {{"type": "image", "image": ...}} with a path, URL, '
            "bytes, pillow image or array."
        )
    return cast("ImageSource", source)
