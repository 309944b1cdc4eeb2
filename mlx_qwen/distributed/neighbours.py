"""Signs of life between ranks that MLX's ring connects: of a cable that was pulled, no reduction tells."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Thread

from mlx_qwen.distributed.environment import JOINING
from mlx_qwen.distributed.frames import Frame
from mlx_qwen.distributed.link import Link
from mlx_qwen.distributed.meeting import Note, accepted, connected

# Seconds in which a rank's end, or its own last words, explain better why a connection to it is gone.
GRACE = 1.0


def watch(
    rank: int, notes: Sequence[Note], listener: socket.socket, names: Mapping[int, str], lost: Callable[[int], None]
) -> list[Link]:
    """Open a link beside each of MLX's connections to the next rank, and accept those of the rank before.

    An address at which MLX is reached and this is not goes unwatched. `lost` is called, from a thread of a link, with
    the number of the rank that nothing comes from any more. `listener` is closed once all had time to come.
    """
    after, before = (rank + 1) % len(notes), (rank - 1) % len(notes)
    for_ring = notes[after].addresses[: notes[after].own or 1]
    found = [connection for address in for_ring if (connection := connected(notes[after], address)) is not None]
    links = [_link(connection, after, names, lost) for connection in found]

    def accept() -> None:
        until = time.monotonic() + JOINING
        with listener:
            while (connection := accepted(listener, notes[rank], until)) is not None:
                links.append(_link(connection, before, names, lost))

    Thread(target=accept, name="mlx-qwen neighbours", daemon=True).start()
    return links


def _link(connection: socket.socket, other: int, names: Mapping[int, str], lost: Callable[[int], None]) -> Link:
    return Link(connection, names[other], _unheard, lambda reason: lost(other))


def _unheard(frame: Frame) -> None:
    """Neighbours say nothing but that they live."""
