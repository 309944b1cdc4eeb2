"""The one question of every incremental parser here: could the end of this text be the start of a tag?"""

from collections.abc import Iterable


def partial_tag_length(text: str, tags: Iterable[str]) -> int:
    """Length of the longest end of `text` that is a proper start of one of `tags`; 0 when there is none."""
    return max((_overlap(text, tag) for tag in tags), default=0)


def _overlap(text: str, tag: str) -> int:
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
