"""How ranks find each other beside MLX's own connections: each listens, and all learn where by one gather."""

import hmac
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import MLXQwenError

_NOTE_BYTES = 1024
_KEY_BYTES = 16
# Seconds to reach one address, and to say who is there.
_REACHING = 3.0


class Note(NamedTuple):
    """Where a rank listens, and the key that shows who belongs to the same launch.

    Of the addresses, the first `own` are those at which MLX's ring reaches it.
    """

    addresses: tuple[str, ...]
    port: int
    key: bytes
    own: int


def listening(rank: int) -> tuple[socket.socket, Note]:
    """A socket of rank `rank` that the other ranks can reach."""
    addresses, own = _addresses(rank)
    alone = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    listener = socket.socket()
    listener.bind(("127.0.0.1" if alone else "", 0))
    listener.listen(64)
    return listener, Note(addresses, listener.getsockname()[1], secrets.token_bytes(_KEY_BYTES), own)


def told(group: mx.distributed.Group, note: Note) -> list[Note]:
    """Every rank's note, on every rank."""
    addresses, line = list(note.addresses), np.zeros((1, _NOTE_BYTES), np.uint8)
    while len(text := json.dumps([addresses, note.port, note.key.hex(), note.own]).encode()) > _NOTE_BYTES:
        addresses.pop()
    line[0, : len(text)] = np.frombuffer(text, np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(line), group=group, stream=mx.cpu))
    lines = [json.loads(row.tobytes().rstrip(b"\0")) for row in gathered]
    return [Note(tuple(found), port, bytes.fromhex(key), own) for found, port, key, own in lines]


def reached(note: Note) -> socket.socket:
    """A connection to rank 0; raises MLXQwenError where none of its addresses can be reached."""
    for address in note.addresses:
        if (connection := connected(note, address)) is not None:
            return connection
    raise MLXQwenError(
        f"Rank 0 cannot be reached at {', '.join(note.addresses)}, port {note.port}. Its firewall must let Python "
        "accept connections, as for MLX's own."
    )


def connected(note: Note, address: str) -> socket.socket | None:
    """A connection to a rank at one of its addresses; None where it cannot be reached there."""
    try:
        connection = socket.create_connection((address, note.port), _REACHING)
        connection.sendall(note.key)
    except OSError:
        return None
    return connection


def accepted(listener: socket.socket, note: Note, until: float) -> socket.socket | None:
    """The next connection that shows the key; None where none came until `until`, of the monotonic clock."""
    while (left := until - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            return None
        connection.settimeout(min(left, _REACHING))
        if _shows(connection, note.key):
            return connection
        connection.close()
    return None


def _shows(connection: socket.socket, key: bytes) -> bool:
    shown = b""
    try:
        while len(shown) < len(key) and (piece := connection.recv(len(key) - len(shown))):
            shown += piece
    except OSError:
        return False
    return hmac.compare_digest(shown, key)


def _addresses(rank: int) -> tuple[tuple[str, ...], int]:
    """Addresses of this machine that others may know, and how many of them, the first ones, the launcher names."""
    named = tuple(dict.fromkeys(_named_by_launcher(rank)))
    alone = named and all(ipaddress.ip_address(one).is_loopback for one in named)
    found = tuple(dict.fromkeys([*named, *(() if alone else _own())])) or ("127.0.0.1",)
    return found, len(named)


def _named_by_launcher(rank: int) -> Iterator[str]:
    """A rank's addresses in the hostfile of MLX's ring; of rank 0, where jaccl meets."""
    places = [os.environ.get("MLX_JACCL_COORDINATOR", "")] if rank == 0 else []
    try:
        with open(os.environ.get("MLX_HOSTFILE", ""), encoding="utf-8") as file:  # noqa: PTH123, "" is no file
            places += json.load(file)[rank]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    for place in places:
        try:
            yield str(ipaddress.ip_address(str(place).rpartition(":")[0].strip("[]")))
        except ValueError:
            continue


def _own() -> Iterator[str]:
    try:
        for _, _, _, _, place in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET, socket.SOCK_STREAM):
            yield str(place[0])
    except OSError:
        return
