"""Images and videos of a prompt, as patches behind their placeholders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Messages
from mlx_qwen.media.grids import Kind
from mlx_qwen.media.limits import MediaLimits
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.media_parts import Media, message_media
from mlx_qwen.prompt.placeholders import expand, starts, timestamped

if TYPE_CHECKING:
    from mlx_qwen.media.image_sources import ImageSource
    from mlx_qwen.media.patches import Patches
    from mlx_qwen.media.video_sources import VideoSource

NO_SIGHT = (
    "{what} cannot be shown to this checkpoint, which is for text only. Use a checkpoint with a vision tower, or "
    "describe in words what there is to see."
)
_MOST_LETTERS = 60


@dataclass(frozen=True, slots=True)
class Placed:
    """Patches of one image or video; its first placeholder is token `start` of the prompt."""

    kind: Kind
    patches: "Patches"
    start: int


def place_media(
    processor: Processor, ids: list[int], media: Sequence[Media], limits: MediaLimits, *, rendered: bool
) -> tuple[list[int], tuple[Placed, ...]]:
    """Token ids with as many placeholders as the media have features, and the media in order.

    `rendered` says that a chat template wrote the ids, so that no placeholder is repeated yet.
    Raises PromptError when one cannot be read, the checkpoint does not see, or media and placeholders do not match.
    """
    groups = []
    for kind, token in ((Kind.IMAGE, processor.image_token_id), (Kind.VIDEO, processor.video_token_id)):
        own = [one for one in media if one.kind is kind]
        if not own and token not in ids:
            continue
        if processor.image_processor is None:
            raise PromptError(NO_SIGHT.format(what=f"The {kind.name.lower()} in the prompt"))
        if token is None:
            raise PromptError(f"The tokenizer has no placeholder for a {kind.name.lower()}. Download it again.")
        groups.append(_Group(processor, kind, token, [prepare(processor, one, limits) for one in own]))
    for group in groups:
        ids = expand(
            ids, group.kind, group.token, group.sizes, group.replacement, rendered=rendered, around=group.around
        )
    placed = [
        Placed(group.kind, patches, start)
        for group in groups
        for patches, start in zip(group.patches, starts(ids, group.token, group.sizes), strict=True)
    ]
    return ids, tuple(sorted(placed, key=lambda one: one.start))


def check_sight(processor: Processor, messages: Messages) -> None:
    """Raises PromptError for an image or video in messages, by its name, when the checkpoint does not see."""
    if processor.sees:
        return
    for index, message in enumerate(messages):
        for media in message_media([message]):
            raise PromptError(NO_SIGHT.format(what=f"{_named(media)} in message {index}"))


def prepare(processor: Processor, media: Media, limits: MediaLimits) -> "Patches":
    """The patches of one image or video, its own limits before the prompt's; ready patches stay as they are."""
    from mlx_qwen.media.patches import Patches

    if isinstance(media.source, Patches):
        return media.source
    images, videos = processor.image_processor, processor.video_processor
    if images is None or videos is None:
        raise PromptError(NO_SIGHT.format(what=_named(media)))
    chosen = media.limits.over(limits)
    if media.kind is Kind.IMAGE:
        return images.limited(chosen)([cast("ImageSource", media.source)])
    return videos.limited(chosen)(cast("VideoSource", media.source))


def describe(processor: Processor, patches: "Patches") -> str:
    """What the model gets to see of an image or video, in one line."""
    from mlx_qwen.media.videos import VideoPatches

    tokens = f"{feature_count(processor, patches):,} tokens"
    if not isinstance(patches, VideoPatches):
        return f"{_called('Image', patches.name)}: {tokens}"
    times = [f"{time:.1f}" for time in patches.timestamps]
    listed = ", ".join(times if len(times) <= 8 else [*times[:4], "…", *times[-3:]])
    frames = f"{patches.sampled:,} of {patches.available:,} frames"
    return f"{_called('Video', patches.name)}: {frames}, {tokens}, at {listed} seconds"


def _named(media: Media) -> str:
    """The image cat.png, or The video where it has no name."""
    kind, source = media.kind.name.lower(), media.source
    is_named = isinstance(source, str | Path) and str(source)[:5].lower() != "data:"
    return f"The {kind} {str(source)[:_MOST_LETTERS]}" if is_named else f"The {kind}"


def _called(kind: str, name: str) -> str:
    """Image cat.png, or Image of 9 bytes where the name is The image of 9 bytes."""
    what = name.removeprefix(f"The {kind.lower()}")
    return f"{kind} {name}" if what == name else kind + what


def feature_count(processor: Processor, patches: "Patches") -> int:
    """How many placeholders stand for an image or video."""
    images = processor.image_processor
    assert images is not None, "patches come from a checkpoint that sees"
    return sum(grid.tokens(images.layout.merge_size) for grid in patches.grids)


class _Group:
    """The images, or the videos, of a prompt, and what stands for them there."""

    def __init__(self, processor: Processor, kind: Kind, token: int, patches: "Sequence[Patches]") -> None:
        self.kind = kind
        self.token = token
        self.patches = patches
        self.sizes = [feature_count(processor, each) for each in patches]
        self._processor = processor
        # A video's patches bring marks of their own, each its pair.
        marks = ("<|vision_start|>", "<|vision_end|>") if kind is Kind.VIDEO else ()
        found = [processor.tokenizer.token_to_id(mark) for mark in marks]
        self.around = (found[0], found[1]) if found else (None, None)

    def replacement(self, index: int) -> list[int]:
        """Token ids in the place of one image or video: its placeholders, those of a video between timestamps."""
        from mlx_qwen.media.videos import VideoPatches

        patches, size = self.patches[index], self.sizes[index]
        if not isinstance(patches, VideoPatches):
            return [self.token] * size
        each = size // len(patches.timestamps)
        texts = [self._processor.encode(timestamped(seconds)) for seconds in patches.timestamps]
        return [copy for text in texts for known in text for copy in [known] * (each if known == self.token else 1)]
