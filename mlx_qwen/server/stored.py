"""Conversations of the Responses protocol that later requests go on with, in memory and bounded."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock

from mlx_qwen.json_types import Message
from mlx_qwen.prompt.media_parts import Media
from mlx_qwen.server.refusals import Refusal

MOST_RESPONSES = 256
MOST_CHARACTERS = 64 << 20


class Stored:
    """Messages by the id of the response that they end with; the least recently used are forgotten."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, tuple[tuple[Message, ...], int]] = OrderedDict()
        self._lock = Lock()

    def put(self, name: str, messages: Sequence[Message]) -> None:
        """Keep a conversation; one that is larger than all that may be held is not kept."""
        size = sum(_size(message) for message in messages)
        with self._lock:
            self._held[name] = (tuple(messages), size)
            while len(self._held) > MOST_RESPONSES or sum(one for _, one in self._held.values()) > MOST_CHARACTERS:
                self._held.popitem(last=False)

    def get(self, name: str) -> tuple[Message, ...]:
        """The conversation up to a response; raises Refusal with 404 for one that is not held."""
        with self._lock:
            if name not in self._held:
                raise Refusal(
                    404,
                    f"The response {name!r:.80} is not held: it was not stored, or was forgotten since. Send its items "
                    "as input instead.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            self._held.move_to_end(name)
            return self._held[name][0]


def _size(value: object) -> int:
    """About how many characters and bytes a message holds."""
    if isinstance(value, Media):
        value = value.source
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8
