"""What goes over a connection: a JSON object, and arrays of bytes behind it."""

import json
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlx_qwen.errors import MLXQwenError

# Lengths of the JSON text and, in it, of the arrays. No honest message is longer.
_HEAD = struct.Struct("!I")
_MOST_TEXT = 256 << 20
_MOST_BYTES = 64 << 30
_PIECE = 1 << 20


class Frame(NamedTuple):
    """A message: what kind it is of, its JSON values, and arrays as bytes."""

    kind: str
    values: Mapping[str, Any]
    parts: Sequence[bytes] = ()


def packed(frame: Frame) -> list[bytes]:
    """A frame as the bytes that are sent one after the other."""
    head = {"kind": frame.kind, "values": frame.values, "parts": [len(part) for part in frame.parts]}
    text = json.dumps(head, separators=(",", ":")).encode()
    return [_HEAD.pack(len(text)) + text, *frame.parts]


def received(connection: socket.socket) -> Frame | None:
    """The next frame; None where the other side has closed the connection.

    Raises TimeoutError where nothing comes for as long as the connection waits, MLXQwenError for what is no frame.
    """
    start = _read(connection, _HEAD.size)
    if start is None:
        return None
    (length,) = _HEAD.unpack(start)
    text = _read(connection, length) if length <= _MOST_TEXT else None
    if text is None:
        return None
    try:
        head = json.loads(text)
        kind, values, lengths = str(head["kind"]), dict(head["values"]), [int(one) for one in head["parts"]]
    except (ValueError, LookupError, TypeError) as error:
        raise MLXQwenError("Another rank sent what is no message of mlx-qwen. Use the same version on all.") from error
    if not 0 <= sum(lengths) <= _MOST_BYTES:
        return None
    parts = [_read(connection, length) for length in lengths]
    whole = [part for part in parts if part is not None]
    return Frame(kind, values, whole) if len(whole) == len(parts) else None


def _read(connection: socket.socket, length: int) -> bytes | None:
    found = bytearray()
    while len(found) < length:
        piece = connection.recv(min(_PIECE, length - len(found)))
        if not piece:
            return None
        found += piece
    return bytes(found)
