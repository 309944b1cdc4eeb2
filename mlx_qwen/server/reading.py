"""The messages of a request: what clients add to them left out, and every image and video vetted before it is read."""

import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mlx_qwen.errors import PromptError
from mlx_qwen.json_types import Json, Message
from mlx_qwen.media.image_sources import decode
from mlx_qwen.media.sources import locate
from mlx_qwen.prompt.media_parts import Media
from mlx_qwen.prompt.shapes import standard_messages
from mlx_qwen.server.refusals import Body, Refusal

# Claude Code's first system block holds a line that differs from session to session and says nothing to a model.
_BILLING = re.compile(r"^x-anthropic-billing-header:[^\n]*\n*", re.MULTILINE)
_SEAL = "mlxqwen1."
_MOST_REASONING = 16 << 20
# Of a request's images together, as many times the largest that one may be.
_TOGETHER = 4
_WEB = ("http://", "https://")
# Items and blocks that stand for something a model can read.
_ITEMS = (
    "message",
    "reasoning",
    "function_call",
    "custom_tool_call",
    "function_call_output",
    "custom_tool_call_output",
)
_FOREIGN = re.compile("server_tool_use|.*_tool_result|container_upload|fallback")


@dataclass(slots=True)
class Reading:
    """What reading a request needs to know, and what it noted.

    Attributes:
        allow_url: whether images and videos may be fetched from the web.
        most_media: most images and videos in a request.
        most_pixels: most pixels that an image may have.
        notes: what was left out or changed.
    """

    allow_url: bool = False
    most_media: int = 64
    most_pixels: int = 64_000_000
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember for the log that something was left out or changed, once."""
        if text not in self.notes:
            self.notes.append(text)

    def messages(self, given: Sequence[Body], at: str, *, roles: Sequence[str]) -> list[Message]:
        """Messages of any protocol in the one shape that prompts have; raises Refusal for what cannot be read."""
        kept = [self._known(message, f"{at}[{index}]", roles) for index, message in enumerate(given)]
        try:
            messages = standard_messages([message for message in kept if message is not None])
        except PromptError as error:
            raise Refusal(400, str(error), param=at) from error
        return self._vetted(messages, at)

    def system(self, given: Json) -> list[Message]:
        """Anthropic's system prompt as a message, its blocks as paragraphs; none where nothing is said."""
        texts = [_text(block) for block in (given if isinstance(given, list) else [given] if given else [])]
        clean = [self._without_billing(text) for text in texts]
        joined = "\n\n".join(text for text in clean if text)
        return [{"role": "system", "content": joined}] if joined else []

    def _known(self, message: Body, at: str, roles: Sequence[str]) -> Body | None:
        """A message without what only its provider reads; None for an item that is nothing else."""
        kind, role = message.get("type", "message"), message.get("role")
        if role is None and kind == "item_reference":
            raise Refusal(400, f"{at} refers to an item; send the item itself, or previous_response_id.", param=at)
        if role is None and kind in _ITEMS and kind != "message":
            return _opened(message)
        if role is None and kind != "message":
            self.note(f"input item of type {kind!r:.40} left out")
            return None
        if role not in roles:
            raise Refusal(400, f"{at}.role is {role!r:.40}; expected one of {', '.join(roles)}.", param=f"{at}.role")
        content = message.get("content")
        if content is None and role != "assistant":
            raise Refusal(400, f"{at}.content is missing; expected a text or a list of parts.", param=f"{at}.content")
        if isinstance(content, list):
            foreign = [one for one in content if isinstance(one, dict) and _FOREIGN.fullmatch(str(one.get("type")))]
            for one in foreign:
                self.note(f"block of type {one['type']!r:.40} left out")
            content = [one for one in content if one not in foreign] if foreign else content
        return {**message, "content": content}

    def _without_billing(self, text: str) -> str:
        clean = _BILLING.sub("", text)
        if clean != text:
            self.note("billing line left out")
        return clean

    def _vetted(self, messages: Sequence[dict[str, object]], at: str) -> list[Message]:
        """The messages with each image and video as bytes: no file of this machine, nothing from the web unasked."""
        count = pixels = 0
        for message in messages:
            content = message["content"]
            for place, part in enumerate(content if isinstance(content, list) else ()):
                if not isinstance(part, Media):
                    continue
                count += 1
                if count > self.most_media:
                    raise Refusal(400, f"The request holds more than {self.most_media} images and videos.", param=at)
                assert isinstance(content, list), "media stand in lists"
                content[place], size = self._fetched(part, at)
                pixels += size
        if pixels > _TOGETHER * self.most_pixels:
            raise Refusal(400, f"All images together have {pixels:,} pixels, more than this server reads.", param=at)
        return list(messages)

    def _fetched(self, media: Media, at: str) -> tuple[Media, int]:
        """The image or video as bytes, and its pixels as far as they can be told without decoding it."""
        what, url = media.kind.name.lower(), media.source
        allowed = ("data:", *_WEB) if self.allow_url else ("data:",)
        if not isinstance(url, str) or not url.lower().startswith(allowed):
            hint = "" if self.allow_url else " Web addresses are fetched only where the server runs with --allow-url."
            raise Refusal(400, f"The {what} {url!r:.80} is not read: send it as a data URL.{hint}", param=at)
        try:
            data, name = locate(url, what=what, most_bytes=self.most_pixels * 4)
            assert isinstance(data, bytes), "neither form is a path"
            image = decode(data, name)
        except PromptError as error:
            raise Refusal(400, str(error), param=at) from error
        size = image.width * image.height if image is not None else 0
        if size > self.most_pixels:
            raise Refusal(
                400,
                f"{name} has {size:,} pixels, more than the {self.most_pixels:,} that this server reads "
                "(--max-image-pixels). Make it smaller first.",
                param=at,
            )
        return replace(media, source=data), size


def _text(block: Json) -> str:
    text = block.get("text") if isinstance(block, dict) else block
    if not isinstance(text, str):
        raise Refusal(400, "system holds something else than text.", param="system")
    return text


def _opened(item: Body) -> Body:
    """An item of reasoning with its text, where it came back packed."""
    if item.get("type") != "reasoning" or item.get("content") or item.get("summary"):
        return item
    return {**item, "content": [{"type": "reasoning_text", "text": unsealed(item.get("encrypted_content"))}]}


def sealed(reasoning: str) -> str:
    """Reasoning for clients that keep it without reading it. It is packed, not secret."""
    return _SEAL + b64encode(zlib.compress(reasoning.encode())).decode()


def unsealed(text: Json) -> str:
    """The reasoning of `sealed`; "" for what came from another server."""
    if not isinstance(text, str) or not text.startswith(_SEAL):
        return ""
    try:
        packed = b64decode(text.removeprefix(_SEAL), validate=True)
        return zlib.decompressobj().decompress(packed, _MOST_REASONING).decode()
    except (ValueError, zlib.error):
        return ""


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


def tool_of(described: Body, parameters: Json, at: str) -> dict[str, object]:
    """A function tool with the fields that mean something here, and no others."""
    name, description = described.get("name"), described.get("description")
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
    if described.get("strict") is True:
        function["strict"] = True
    return {"type": "function", "function": function}
