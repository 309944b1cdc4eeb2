"""Ranks that share a model: as threads of the test, whose collectives go through its memory, or as real processes."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest

from tools.benchmarks.rings import ring

ROOT = Path(__file__).resolve().parents[2]
Result = TypeVar("Result")
_PATIENCE = 60


class ThreadGroup:
    """One rank's end of a group whose ranks are threads, with what it was asked to send: "sum" or "gather", bytes."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, table: list[np.ndarray | None]) -> None:
        self._rank, self._size, self._barrier, self._table = rank, size, barrier, table
        self.mail: list[Queue[np.ndarray]] = []
        self.sent: list[tuple[str, int]] = []

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def exchange(self, kind: str, x: mx.array) -> list[np.ndarray]:
        """Every rank's x in fp32."""
        self.sent.append((kind, x.nbytes))
        self._table[self._rank] = np.array(x.astype(mx.float32))
        self._barrier.wait(_PATIENCE)
        parts = [part for part in self._table if part is not None]
        self._barrier.wait(_PATIENCE)
        return parts


def in_threads(count: int, work: Callable[[Any], Result], monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """What `work(group)` returns on each of `count` ranks, which run at once; steps are not compiled meanwhile."""

    def all_sum(x: mx.array, *, group: ThreadGroup) -> mx.array:
        return mx.array(sum(group.exchange("sum", x))).astype(x.dtype)

    def all_gather(x: mx.array, *, group: ThreadGroup) -> mx.array:
        return mx.array(np.concatenate(group.exchange("gather", x))).astype(x.dtype)

    def send(x: mx.array, to: int, *, group: ThreadGroup) -> mx.array:
        group.sent.append(("send", x.nbytes))
        group.mail[to].put(np.array(x.astype(mx.float32)))
        return x

    def recv_like(x: mx.array, _: int, *, group: ThreadGroup) -> mx.array:
        return mx.array(group.mail[group.rank()].get(timeout=_PATIENCE)).astype(x.dtype)

    mail: list[Queue[np.ndarray]] = [Queue() for _ in range(count)]
    with monkeypatch.context() as patch:
        patch.setattr(mx.distributed, "send", send)
        patch.setattr(mx.distributed, "recv_like", recv_like)
        patch.setattr(mx.distributed, "all_sum", all_sum)
        patch.setattr(mx.distributed, "all_gather", all_gather)
        for place in ("mlx_qwen.model.qwen", "mlx_qwen.model.mtp_steps"):
            patch.setattr(f"{place}.can_compile", lambda: False)
        barrier, table = threading.Barrier(count), [None] * count

        def run(rank: int) -> Result:
            try:
                group = ThreadGroup(rank, count, barrier, table)  # type: ignore[arg-type]
                group.mail = mail
                return work(group)
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(run, range(count)))


def in_processes(count: int, script: str, *arguments: object, folder: Path, patience: float = 120) -> list[str]:
    """What a Python script prints on each of `count` ranks of MLX's ring over loopback, in processes that end here.

    `folder` takes the file that names their ports. Raises AssertionError with what they wrote when one of them fails,
    or when they take longer than `patience` seconds.
    """
    command = [sys.executable, "-c", script, *map(str, arguments)]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in ring(count, folder)
    ]
    end = time.monotonic() + patience
    try:
        written = [rank.communicate(timeout=max(end - time.monotonic(), 0.1)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert all(rank.returncode == 0 for rank in ranks), written
    return [out for out, _ in written]
