"""Images and videos in chat messages: finding them, and what each of them asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json, Message, Messages
from mlx_qwen.media.grids import Kind
from mlx_qwen.media.limits import NAMES, MediaLimits

_NAMES = {
    Kind.IMAGE: ("image", "image_url", "input_image"),
    Kind.VIDEO: ("video", "video_url", "input_video"),
}
_UNREAD = ("audio", "audio_url", "input_audio")
_ADDRESSES = ("url", "path", "base64", "source")
_OPTIONS = {Kind.IMAGE: ("min_pixels", "max_pixels"), Kind.VIDEO: NAMES}
# OpenAI's word on an image's resolution asks for nothing that could be done here.
# Anthropic's marks of what to cache are none for a local prefix cache.
_IGNORED = ("detail", "cache_control")
_BESIDE_CONTENT = (*_NAMES[Kind.IMAGE], *_NAMES[Kind.VIDEO], "images", "videos")


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
    """Whether a content part is an image or a video; None for text.

    Raises PromptError for audio, and for a part that holds several of them, of which one alone would be read.
    """
    if isinstance(part, Media):
        return part.kind
    kind = _kind_name(part)
    if kind in _UNREAD:
        raise PromptError(f"{where} holds {kind} content; this model reads text, images and videos.")
    held = _held(part, kind)
    if len(held) > 1:
        raise PromptError(f"{where} has one part with {' and '.join(held)}; make each a part of its own.")
    return next((known for known, names in _NAMES.items() if kind in names), None)


def check_fields(message: Message, where: str) -> None:
    """Raises PromptError for an image or video beside a message's content, where no chat template looks."""
    for name in _BESIDE_CONTENT:
        if _is_given(message.get(name)):
            raise PromptError(
                f"{where} has {name!r} beside its content; make each image and video a part of the content, like "
                '{"type": "image", "image": ...}.'
            )


def placeholder_part(kind: Kind) -> Json:
    """The content part that a chat template gets in the place of an image or video."""
    return {"type": _NAMES[kind][0]}


def message_media(messages: Messages) -> list[Media]:
    """The images and videos of all messages, in order.

    Raises PromptError for a part without an image or video, with several, or with options that are not its own.
    """
    found = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        parts = content if isinstance(content, Sequence) and not isinstance(content, str | bytes) else ()
        where = f"Message {index}"
        found += [as_media(part, where) for part in parts if media_kind(part, where) is not None]
    return found


def as_media(part: Media | Mapping[str, object], where: str) -> Media:
    """The image or video that a content part of such a kind holds; raises PromptError as `message_media` does."""
    if isinstance(part, Media):
        return part
    kind = media_kind(part, where)
    assert kind is not None, "the caller has asked"
    return _read(part, kind, where)


def with_media(messages: Messages, media: Sequence[Media]) -> list[Message]:
    """The messages, with media in front of the last user's words; raises PromptError when no user speaks."""
    last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if last is None:
        raise PromptError(
            'Images and videos need a message with role "user" to stand in; add one that asks about them.'
        )
    content = messages[last].get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = [*media, *cast(Sequence[object], text or ())]
    return [*messages[:last], {**messages[last], "content": parts}, *messages[last + 1 :]]


def _kind_name(part: object) -> object:
    if not isinstance(part, Mapping):
        return None
    names = (*_NAMES[Kind.IMAGE], *_NAMES[Kind.VIDEO], *_UNREAD)
    return part.get("type") or next((name for name in names if _is_given(part.get(name))), None)


def _held(part: object, kind: object) -> list[str]:
    """What a content part holds or says it is, as errors call it."""
    if not isinstance(part, Mapping):
        return []
    fields = {"text": ("text",), "an image": _NAMES[Kind.IMAGE], "a video": _NAMES[Kind.VIDEO], "audio": _UNREAD}
    return [what for what, names in fields.items() if kind in names or any(_is_given(part.get(name)) for name in names)]


def _is_given(value: object) -> bool:
    """Tables of messages fill the fields that a part lacks with null, "" or []."""
    return value is not None and not (isinstance(value, Sequence) and not len(value))


def _read(part: Mapping[str, object], kind: Kind, where: str) -> Media:
    given = {key: value for key, value in part.items() if _is_given(value) and key != "text"}
    named = [key for key in (*_NAMES[kind], *_ADDRESSES) if part.get(key) is not None]
    # One that is empty is left to whoever opens it, who says what is wrong.
    sources = [key for key in named if key in given] or named[:1]
    if len(sources) > 1:
        raise PromptError(f"{where} gives {_a(kind)} as {sources[0]!r} and as {sources[1]!r}; keep one of them.")
    source = part[sources[0]] if sources else None
    nested: Mapping[str, object] = {}
    if sources == ["base64"]:
        source = _data_url(kind, source)
    if isinstance(source, Mapping):
        nested, source = {key: value for key, value in source.items() if _is_given(value)}, source.get("url")
        if sources == ["source"] and nested.get("type") == "base64":
            source = _data_url(kind, nested.pop("data", ""), nested.pop("media_type", None))
        if sources == ["source"] and nested.get("type") in ("base64", "url"):
            del nested["type"]
    if source is None:
        name = _NAMES[kind][0]
        raise PromptError(
            f'{where} has {_a(kind)} part without {_a(kind)}; expected {{"type": "{name}", "{name}": ...}} with a '
            "path, URL, bytes, " + ("pillow image or array." if kind is Kind.IMAGE else "list of frames or array.")
        )
    options, ignored = _OPTIONS[kind], (_IGNORED if kind is Kind.IMAGE else ())
    unknown = [key for key in given if key not in (*sources, *options, *ignored, "type")]
    unknown += [key for key in nested if key not in ("url", *options, *ignored)]
    if unknown:
        raise PromptError(f"{where} gives {_a(kind)} {unknown[0]!r}; expected {', '.join(options)} or nothing.")
    chosen = {key: value for key, value in {**given, **nested}.items() if key in NAMES}
    return Media(kind, source, MediaLimits(**chosen))  # type: ignore[arg-type]


def _data_url(kind: Kind, encoded: object, media_type: object = None) -> str:
    return f"data:{media_type or kind.name.lower() + '/*'};base64,{encoded}"


def _a(kind: Kind) -> str:
    return "an image" if kind is Kind.IMAGE else "a video"
