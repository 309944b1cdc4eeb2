"""The tasks' questions as prompts of `generate`: pictures drawn, answers left out."""

from collections.abc import Iterator

from mlx_qwen.demo.tasks.drawing import draw_clip, draw_scene
from mlx_qwen.demo.tasks.example import Example, Message

SCALE = 4


def question(example: Example) -> str | list[Message]:
    """What the model is shown: the messages before the last answer, or the beginning of a plain text."""
    if not example.messages:
        return example.text[: example.cut]
    media: Iterator[dict[str, object]] = iter(
        [{"type": "image", "image": draw_scene(scene, SCALE)} for scene in example.pictures]
        + [
            {
                "type": "video",
                "video": draw_clip(clip, SCALE),
                "fps": clip.frames_per_second,
                "source_fps": clip.frames_per_second,
            }
            for clip in example.clips
        ]
    )
    return [_with_media(message, media) for message in example.messages[:-1]]


def _with_media(message: Message, media: Iterator[dict[str, object]]) -> Message:
    content = message["content"]
    if not isinstance(content, list):
        return message
    return {**message, "content": [part if part["type"] == "text" else next(media) for part in content]}
