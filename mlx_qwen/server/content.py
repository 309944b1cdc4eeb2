"""The content of messages as each protocol writes it, brought to text, images and videos."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mlx_qwen.json_types import Json
from mlx_qwen.server.refusals import Body, Refusal

_TEXTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
_IMAGES = ("image_url", "input_image", "image")
_VIDEOS = ("video_url", "input_video", "video")
_MEDIA_OPTIONS = ("min_pixels", "max_pixels", "total_pixels", "fps", "min_frames", "max_frames")

Content = str | list[dict[str, object]]


@dataclass(slots=True)
class Reading:
    """What reading a request needs to know, and what it noted.

    Attributes:
        allow_url: whether images and videos may be fetched from the web.
        most_media: most images and videos in a request.
        notes: what was left out or changed.
    """

    allow_url: bool = False
    most_media: int = 64
    notes: list[str] = field(default_factory=list)
    media: int = 0

    def note(self, text: str) -> None:
        """Remember for the log that something was left out or changed, once."""
        if text not in self.notes:
            self.notes.append(text)


def content_of(value: Json, at: str, reading: Reading) -> Content:
    """A message's content: one text, or parts where it holds images or videos."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise Refusal(400, f"{at} is a {type(value).__name__}; expected a text or a list of parts.", param=at)
    parts = [_part(one, f"{at}[{index}]", reading) for index, one in enumerate(value)]
    if all(part["type"] == "text" for part in parts):
        return "".join(str(part["text"]) for part in parts)
    return list(parts)


def text_of(value: Json, at: str, reading: Reading) -> str:
    """Content that can only be text."""
    content = content_of(value, at, reading)
    if not isinstance(content, str):
        raise Refusal(400, f"{at} holds an image or video; expected text.", param=at)
    return content


def _part(part: Json, at: str, reading: Reading) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise Refusal(400, f"{at} is a {type(part).__name__}; expected a content part.", param=at)
    kind = part.get("type")
    if kind in _TEXTS or kind == "refusal":
        text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise Refusal(400, f"{at}.text is missing or no text.", param=at)
        return {"type": "text", "text": text}
    if kind in _IMAGES:
        return _medium("image", part, at, reading, _IMAGES)
    if kind in _VIDEOS:
        return _medium("video", part, at, reading, _VIDEOS)
    if kind == "document" and isinstance(source := part.get("source"), dict) and source.get("type") == "text":
        return {"type": "text", "text": str(source.get("data", ""))}
    if kind in ("search_result", "tool_reference"):
        reading.note(f"a content part of type {kind} was given as JSON")
        return {"type": "text", "text": json.dumps(part, ensure_ascii=False)}
    raise Refusal(
        400,
        f"{at} is of type {kind!r}, which this server does not read; expected text, images or videos.",
        param=f"{at}.type",
    )


def _medium(kind: str, part: Body, at: str, reading: Reading, names: Sequence[str]) -> dict[str, object]:
    reading.media += 1
    if reading.media > reading.most_media:
        raise Refusal(400, f"The request holds more than {reading.most_media} images and videos.", param=at)
    given = [part[name] for name in (*names, "source", "url") if part.get(name) is not None]
    source = given[0] if len(given) == 1 else None
    nested: Mapping[str, Json] = source if isinstance(source, dict) else {}
    url = source if isinstance(source, str) else nested.get("url")
    if nested.get("type") == "base64":
        url = f"data:{nested.get('media_type')};base64,{nested.get('data')}"
    if not isinstance(url, str) or not url:
        raise Refusal(400, f"{at} has no {kind}: expected one data URL, or base64 data.", param=at)
    scheme = url[:8].lower()
    if not scheme.startswith("data:") and not (reading.allow_url and scheme.startswith(("http://", "https://"))):
        allowed = "only data: and http(s): URLs are read" if reading.allow_url else "only data: URLs are read"
        hint = "" if reading.allow_url else " Start the server with --allow-url to let it fetch from the web."
        raise Refusal(400, f"{at} is a URL that is not fetched: {allowed}.{hint}", param=at)
    options = {name: value for name in _MEDIA_OPTIONS if (value := {**part, **nested}.get(name)) is not None}
    return {"type": kind, kind: url, **options}


def tool_of(name: Json, description: Json, parameters: Json, at: str) -> dict[str, object]:
    """A function tool with the fields that a model is shown, and no others."""
    if not isinstance(name, str) or not name or len(name) > 256 or any(sign in name for sign in "<>\n\r"):
        raise Refusal(400, f"{at}.name is no name of a function.", param=f"{at}.name")
    if description is not None and not isinstance(description, str):
        raise Refusal(400, f"{at}.description is no text.", param=f"{at}.description")
    if parameters is not None and not isinstance(parameters, dict):
        raise Refusal(400, f"{at} has parameters that are no JSON schema: expected an object.", param=at)
    function: dict[str, object] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def function_tools(
    tools: Sequence[Body] | None, reading: Reading, read: Callable[[Body, str], dict[str, object] | None]
) -> list[dict[str, object]]:
    """The tools that are functions, as `read` makes them; others are left out, as clients count on it."""
    made = []
    for index, tool in enumerate(tools or ()):
        one = read(tool, f"tools[{index}]")
        if one is None:
            reading.note(f"tool type {tool.get('type')!r:.40} ignored")
        else:
            made.append(one)
    return made
