"""Paths and URLs as people type, quote, escape and drag them."""

import re
import shlex
from pathlib import Path
from urllib.parse import unquote

from mlx_qwen.errors import PromptError

_ADDRESS = re.compile("(https?|data):", re.IGNORECASE)
_FILE_URL = re.compile("file://(localhost(?=/))?", re.IGNORECASE)
_ADVICE = "Drag the file here, or put its path in quotes."


def sources(text: str) -> list[str]:
    """The paths and URLs in what was typed: one or several, quoted, escaped, as file:// URLs, or one as it stands.

    Raises PromptError where a quote stays open, or words are no files.
    """
    whole = text.strip()
    if _is_file(whole) or (_ADDRESS.match(whole) and not re.search(r"\s", whole)):
        return [_path(whole)]
    try:
        words = [_path(word) for word in shlex.split(whole)]
    except ValueError as error:
        raise PromptError(f"{whole:.200} has a quote or backslash too many ({error}). {_ADVICE}") from error
    missing = [word for word in words if not _ADDRESS.match(word) and not _is_file(word)]
    if missing and len(words) > 1:
        raise PromptError(f"{missing[0]:.200} is no file. {_ADVICE}")
    return words


def are_files(text: str) -> bool:
    """Whether a text is nothing but paths of files, as when they were dragged here."""
    if not re.match(r"['\"/~]|file:", text):
        return False
    try:
        return all(map(_is_file, sources(text)))
    except PromptError:
        return False


def destination(text: str) -> Path:
    """The one path that was typed, quoted, escaped or as it stands, whether or not there is a file."""
    whole = text.strip()
    try:
        words = shlex.split(whole)
    except ValueError:
        words = []
    word = words[0] if len(words) == 1 else whole
    try:
        return Path(_path(word)).expanduser()
    except RuntimeError as error:
        raise PromptError(f"{word:.200} is in a home that does not exist ({error}). Give another path.") from error


def _path(word: str) -> str:
    """A word, or the path that a file:// URL names."""
    address = _FILE_URL.match(word)
    return unquote(word[address.end() :]) if address else word


def _is_file(word: str) -> bool:
    try:
        return Path(_path(word)).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False
