"""A connection between two ranks, on which something goes both ways every second as long as both are alive."""

import socket
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Event, Thread

from mlx_qwen.distributed.frames import Frame, packed, received
from mlx_qwen.errors import MLXQwenError

# Seconds between signs of life, and without any after which the other side is taken to stand still.
BEAT, PATIENCE = 0.5, 7.0
_ALIVE = Frame("alive", {})


class Link:
    """Sends frames in their order, without ever making the sender wait, and hands on those that come.

    Args:
        connection: to the other rank.
        other: what the other side is called in messages.
        on_frame: gets each frame, in a thread of the link's own.
        on_lost: gets why there will be no more, once: that the other side has gone or stands still.
    """

    def __init__(
        self,
        connection: socket.socket,
        other: str,
        on_frame: Callable[[Frame], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self.other = other
        self._gone = f"{other} has gone: it ended, was killed, or its connection broke"
        self._connection = connection
        self._on_frame, self._on_lost = on_frame, on_lost
        self._out: SimpleQueue[Frame | None] = SimpleQueue()
        self._closed = Event()
        self._sent_all = Event()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(PATIENCE)
        for work in (self._send, self._receive):
            Thread(target=work, name=f"mlx-qwen link to {other}", daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Send a frame behind those before it."""
        self._out.put(frame)

    def close(self, patience: float = 2.0) -> None:
        """Send what is to be sent, then say that no more will come; nothing is told of a loss from now on."""
        self._closed.set()
        self._out.put(None)
        self._sent_all.wait(patience)
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _send(self) -> None:
        try:
            while True:
                try:
                    frame = self._out.get(timeout=BEAT)
                except Empty:
                    frame = _ALIVE
                if frame is None:
                    return
                for part in packed(frame):
                    self._connection.sendall(part)
        except OSError:
            # Why, the receiving side knows better.
            return
        finally:
            self._sent_all.set()

    def _receive(self) -> None:
        try:
            while (frame := received(self._connection)) is not None:
                if frame.kind != _ALIVE.kind:
                    self._on_frame(frame)
            reason = self._gone
        except TimeoutError:
            reason = f"{self.other} stands still: nothing came from it for {PATIENCE:.0f} s"
        except OSError:
            reason = self._gone
        except MLXQwenError as error:
            reason = str(error)
        if not self._closed.is_set():
            self._on_lost(reason)
