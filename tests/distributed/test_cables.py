"""A cable between two other ranks that is pulled ends all of them within seconds, whatever they compute."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_qwen.distributed import link
from mlx_qwen.distributed.meeting import Note, listening
from mlx_qwen.distributed.neighbours import watch
from tests.distributed.hosts import are_possible, hosts
from tests.distributed.processes import ranks

# Ten seconds are promised of Macs that do nothing else; here other tests run beside.
PATIENCE = 20.0


@contextmanager
def relayed(note: Note) -> Iterator[tuple[Note, threading.Event]]:
    """The note of a rank that is reached through a cable, which carries nothing once the event is set."""
    pulled, entrance = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1 << 12):
            if not pulled.is_set():
                target.sendall(data)

    def serve() -> None:
        near, _ = entrance.accept()
        far = socket.create_connection(("127.0.0.1", note.port))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=carry, args=pair, daemon=True).start()

    with entrance:
        threading.Thread(target=serve, daemon=True).start()
        yield note._replace(port=entrance.getsockname()[1]), pulled


def test_both_neighbours_notice_a_cable_that_carries_nothing_and_none_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PATIENCE", 1.5)
    monkeypatch.setattr(link, "BEAT", 0.1)
    listeners, notes = zip(*(listening(rank) for rank in range(3)), strict=True)
    lost: list[tuple[int, int]] = []
    with relayed(notes[2]) as (through_cable, pulled):
        told, names = [notes[0], notes[1], through_cable], {rank: f"rank {rank}" for rank in range(3)}
        for rank in range(3):
            watch(rank, told, listeners[rank], names, lambda other, rank=rank: lost.append((rank, other)))
        time.sleep(2)
        assert lost == []
        pulled.set()
        end = time.monotonic() + PATIENCE
        while len(lost) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
    assert sorted(lost) == [(1, 2), (2, 1)]


@pytest.mark.skipif(not are_possible(), reason="only Linux's administrator makes hosts of network namespaces")
def test_a_cable_pulled_between_two_other_ranks_ends_all_with_both_named() -> None:
    words = ("Count from one to thirty:", "--temp", 0, "--max-tokens", 4000, "--pipeline")
    with hosts() as made, ranks(made.count, "generate", *words, on=made) as started:
        end = time.monotonic() + 60
        while not started.out(0) and time.monotonic() < end:
            time.sleep(0.05)
        assert started.out(0)
        made.cut(1, 2)
        assert started.ended(PATIENCE) == [1, 1, 1]
        for rank in range(3):
            (error,) = [line for line in started.err(rank).splitlines() if line.startswith("Error: ")]
            assert "The connection between rank " in error
            assert "rank 1 (" in error
            assert "rank 2 (" in error
