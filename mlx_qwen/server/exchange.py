"""What each protocol is: a class whose objects read one request and write its answer."""

import secrets
from collections.abc import Callable
from typing import Protocol, TypeAlias

from mlx_qwen.server.reading import Reading
from mlx_qwen.server.refusals import Body, Refusal
from mlx_qwen.server.work import Ask, Piece, Prepared


class Exchange(Protocol):
    """One request and its answer in a protocol's form.

    The methods from `begin` on return what a stream sends; `body` is the same answer as one object. Whoever does not
    stream calls them all the same and sends `body`.
    """

    ask: Ask

    def begin(self, prepared: Prepared) -> bytes:
        """The request is good; its answer begins."""

    def add(self, index: int, piece: Piece) -> bytes:
        """More of answer `index`."""

    def end(self) -> bytes:
        """All answers are whole."""

    def ping(self) -> bytes:
        """A sign of life while nothing is written."""

    def failed(self, refusal: Refusal) -> bytes:
        """The end of a stream that cannot go on."""

    def body(self) -> Body:
        """The whole answer."""


# Reads a request of one protocol; raises Refusal for one that cannot be answered.
Reader: TypeAlias = Callable[[Body, Reading], Exchange]


def new_id(prefix: str) -> str:
    """A name that no other answer, item or call has."""
    return f"{prefix}{secrets.token_hex(12)}"
