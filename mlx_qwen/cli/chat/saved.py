"""Conversations as files: JSON with messages as OpenAI's API has them, images and videos by path or URL."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen.conversation import Conversation
from mlx_qwen.errors import PromptError

_FORMAT = "mlx-qwen chat 1"


def save(conversation: Conversation, file: Path, *, model: str) -> None:
    """Writes the conversation; raises PromptError where that cannot be, or another file would be lost."""
    if file.exists():
        _read(file, "It stays as it is; choose another name.")
    content = {"format": _FORMAT, "model": model, "messages": conversation.messages()}
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        descriptor, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(part).replace(file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{file} cannot be written ({getattr(error, 'strerror', None) or error}). Choose another place."
        ) from error


def load(conversation: Conversation, file: Path) -> None:
    """Goes on from a saved conversation; raises PromptError, and changes nothing, for any other file."""
    content = _read(file, "Expected a file that /save wrote.")
    try:
        conversation.restore(content["messages"])
    except PromptError as error:
        raise PromptError(f"{file} cannot be gone on with: {error}") from error


def _read(file: Path, advice: str) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"{file} cannot be read ({getattr(error, 'strerror', None) or error}). {advice}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or not _are_messages(content.get("messages")):
        raise PromptError(f"{file} holds no conversation. {advice}")
    return content


def _are_messages(messages: object) -> bool:
    """Whether they have the outer form; what they say is checked with the model's template."""
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("content"), str | list) for message in messages
    )
