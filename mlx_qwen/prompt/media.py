"""Images and videos in chat messages: finding them, and what each of them asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from mlx_qwen.errors import PromptError
from mlx_qwen.grids import Kind
from mlx_qwen.prompt.json_types import Json, Message, Messages
from mlx_qwen.prompt.limits import NAMES, MediaLimits

_NAMES = {
    Kind.IMAGE: ("image", "image_url", "input_image"),
    Kind.VIDEO: ("video", "video_url", "input_video"),
}
_UNREAD = ("audio", "audio_url", "input_audio")
_IMAGE_LIMITS = ("min_pixels", "max_pixels")
_ADDRESSES = ("url", "path")


@dataclass(frozen=True, slots=True)
class Media:
    """An image or video that a prompt holds: an `ImageSource` or `VideoSource`, or patches that are ready."""

    kind: Kind
    source: object
    limits: MediaLimits = field(default_factory=MediaLimits)

    @property
    def part(self) -> dict[str, object]:
        """The content part that holds it."""
        chosen = {name: getattr(self.limits, name) for name in NAMES}
        name = _NAMES[self.kind][0]
        return {"type": name, name: self.source, **{key: x for key, x in chosen.items() if x is not None}}


def media_kind(part: object, where: str) -> Kind | None:
    """Whether a content part is an image or a video; None for text. Raises PromptError for audio."""
    kind = _kind_name(part)
    if kind in _UNREAD:
        raise PromptError(f"{where} holds {kind} content; this model reads text, images and videos.")
    return next((known for known, names in _NAMES.items() if kind in names), None)


def placeholder_part(kind: Kind) -> Json:
    """The content part that a chat template gets in the place of an image or video."""
    return {"type": _NAMES[kind][0]}


def message_media(messages: Messages) -> list[Media]:
    """The images and videos of all messages, in order.

    Raises PromptError for a part without an image or video, or with options that are not its own.
    """
    found = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else ()
        for part in parts:
            kind = media_kind(part, f"Message {index}")
            if kind is not None:
                found.append(_read(part, kind, f"Message {index}"))
    return found


def with_media(messages: Messages, media: Sequence[Media]) -> list[Message]:
    """The messages, with media in front of the last user's words; raises PromptError when no user speaks."""
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if last is None:
        raise PromptError(
            'Images and videos need a message with role "user" to stand in; add one that asks about them.'
        )
    content = messages[last].get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [*(one.part for one in media), *cast(Sequence[object], text or ())]
    return [*messages[:last], {**messages[last], "content": parts}, *messages[last + 1 :]]


def _kind_name(part: object) -> object:
    if not isinstance(part, Mapping):
        return None
    names = (*_NAMES[Kind.IMAGE], *_NAMES[Kind.VIDEO], *_UNREAD)
    return part.get("type") or next((name for name in names if name in part), None)


def _read(part: Mapping[str, object], kind: Kind, where: str) -> Media:
    name, names = _NAMES[kind][0], (*_NAMES[kind], *_ADDRESSES)
    source = next((part[key] for key in names if part.get(key) is not None), None)
    nested: Mapping[str, object] = {}
    if isinstance(source, Mapping):
        nested, source = source, source.get("url")
    if source is None:
        raise PromptError(
            f'{where} has {_a(kind)} part without {_a(kind)}; expected {{"type": "{name}", "{name}": ...}} with a '
            "path, URL, bytes, " + ("pillow image or array." if kind is Kind.IMAGE else "list of frames or array.")
        )
    options = _IMAGE_LIMITS if kind is Kind.IMAGE else NAMES
    chosen = {key: value for key, value in {**part, **nested}.items() if key in NAMES}
    unknown = [key for key in part if key not in (*names, *options, "type")] if kind is Kind.VIDEO else []
    unknown += [key for key in chosen if key not in options]
    if unknown:
        raise PromptError(f"{where} gives {_a(kind)} {unknown[0]!r}; expected {', '.join(options)} or nothing.")
    return Media(kind, source, MediaLimits(**chosen))  # type: ignore[arg-type]


def _a(kind: Kind) -> str:
    return "an image" if kind is Kind.IMAGE else "a video"
