"""Connections: one that asks nothing is let go of, so that nobody can hold them all."""

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_qwen.server.refusals import Refusal, openai_error
from mlx_qwen.server.wire import json_bytes

# Seconds that a connection may be open, or go on behind an answer, without all headers of a request.
PATIENCE = 10.0
MOST = 1000
_FILES = 4096


class Connection(H11Protocol):
    """Ends where no request comes in time; of too many, the one that has waited longest without one goes."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody connected."""
        super().connection_made(transport)
        self._wait()
        if len(self.connections) > _most():
            self._make_room()

    def handle_events(self) -> None:
        """More came."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._wait_no_more()

    def on_response_complete(self) -> None:
        """An answer is whole."""
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._wait_no_more()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        others = (one for one in self.connections if isinstance(one, Connection) and one is not self)
        waiting = [(one._waiting.when(), one) for one in others if one._waiting is not None]
        if waiting:
            _, longest = min(waiting, key=lambda one: one[0])
            longest._drop()
        else:
            self._end("503 Service Unavailable", Refusal(503, "Too many connections are open. Try again later."))

    def _drop(self) -> None:
        self._wait_no_more()
        self.connections.discard(self)  # at once, where many come together
        self.transport.abort()

    def _wait(self) -> None:
        self._wait_no_more()
        self._waiting = self.loop.call_later(PATIENCE, self._late)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        if self.cycle is None and self.conn.trailing_data[0]:
            self._end("408 Request Timeout", Refusal(408, f"No headers came within {PATIENCE:.0f} seconds."))
        else:
            self._drop()

    def _end(self, status: str, refusal: Refusal) -> None:
        body = json_bytes(openai_error(refusal))
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.transport.close()


def allow_files() -> None:
    """Lets the process have enough open files for its connections: a Mac's shells allow 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _most() -> int:
    """Connections at the same time: half of the files that the process may have open, and no more than `MOST`."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(MOST, soft // 2)
