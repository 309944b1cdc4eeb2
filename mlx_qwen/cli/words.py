"""Several values after one flag: `--image a.png b.png` is `--image a.png --image b.png`."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

_MANY = ("--image", "--video")
_ADDRESS = re.compile(r"(https?|file|data):", re.IGNORECASE)
_FILE = re.compile(r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|heic|avif|mp4|mov|m4v|mkv|webm|avi)", re.IGNORECASE)


class ManyValuesCommand(click.Command):
    """A command whose flags for images and videos take what follows them, as far as it is files and addresses."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_with_repeated_flags(args)))


def _with_repeated_flags(args: Sequence[str]) -> Iterator[str]:
    flag, values = "", 0
    for index, word in enumerate(args):
        if word == "--":
            yield from args[index:]
            return
        if flag and not word.startswith("-") and (values == 0 or _is_media(word)):
            yield from (word,) if values == 0 else (flag, word)
            values += 1
            continue
        name = word.partition("=")[0]
        flag, values = (name, int("=" in word)) if name in _MANY else ("", 0)
        yield word


def _is_media(word: str) -> bool:
    """Whether a word is a file or an address, rather than the question."""
    if _ADDRESS.match(word) or _FILE.fullmatch(word):
        return True
    try:
        return Path(word).expanduser().is_file()
    except (OSError, RuntimeError):  # a question can be too long for a name
        return False
