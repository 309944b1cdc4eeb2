"""How ranks find each other beside MLX's own connections: rank 0 listens, and all learn where by one gather."""

import hmac
import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.errors import MLXQwenError

_NOTE_BYTES = 1024
_KEY_BYTES = 16
# Seconds to reach one address of rank 0, and to say who is there.
_REACHING = 3.0


class Note(NamedTuple):
    """Where rank 0 listens, and the key that shows who belongs to the same launch."""

    addresses: tuple[str, ...]
    port: int
    key: bytes


@contextmanager
def listening() -> Iterator[tuple[socket.socket, Note]]:
    """A socket of rank 0 that the other ranks can reach."""
    addresses = _addresses()
    alone = all(ipaddress.ip_address(address).is_loopback for address in addresses)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1" if alone else "", 0))
        listener.listen(64)
        yield listener, Note(addresses, listener.getsockname()[1], secrets.token_bytes(_KEY_BYTES))


def told(group: mx.distributed.Group, note: Note | None) -> Note:
    """Rank 0's note, on every rank."""
    line = np.zeros((1, _NOTE_BYTES), np.uint8)
    if note is not None:
        addresses, room = list(note.addresses), _NOTE_BYTES
        while len(text := json.dumps([addresses, note.port, note.key.hex()]).encode()) > room:
            addresses.pop()
        line[0, : len(text)] = np.frombuffer(text, np.uint8)
    gathered = np.array(mx.distributed.all_gather(mx.array(line), group=group, stream=mx.cpu))
    found, port, key = json.loads(gathered[0].tobytes().rstrip(b"\0"))
    return Note(tuple(found), port, bytes.fromhex(key))


def reached(note: Note) -> socket.socket:
    """A connection to rank 0; raises MLXQwenError where none of its addresses can be reached."""
    for address in note.addresses:
        try:
            connection = socket.create_connection((address, note.port), _REACHING)
            connection.sendall(note.key)
            return connection
        except OSError:
            continue
    raise MLXQwenError(
        f"Rank 0 cannot be reached at {', '.join(note.addresses)}, port {note.port}. Its firewall must let Python "
        "accept connections, as for MLX's own."
    )


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


def _addresses() -> tuple[str, ...]:
    """Addresses of this machine that others may know, those that the launcher names first."""
    found = [*_named_by_launcher()]
    if not found or not all(ipaddress.ip_address(one).is_loopback for one in found):
        found += _own()
    return tuple(dict.fromkeys(found)) or ("127.0.0.1",)


def _named_by_launcher() -> Iterator[str]:
    """Rank 0's addresses in the hostfile of MLX's ring, or where its jaccl meets."""
    places = [os.environ.get("MLX_JACCL_COORDINATOR", "")]
    try:
        with open(os.environ.get("MLX_HOSTFILE", ""), encoding="utf-8") as file:  # noqa: PTH123, "" is no file
            places += json.load(file)[0]
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
