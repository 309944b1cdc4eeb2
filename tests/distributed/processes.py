"""Commands on several ranks of this machine, as MLX's launcher starts them: by its ring over loopback."""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.hosts import Hosts
from tests.support.ranks import ROOT
from tools.benchmarks.rings import ring

PATIENCE = 60.0
_LISTENING = re.compile(r"Listening at (http://\S+) ")


class Ranks:
    """The processes of one command, rank by rank, and what they write."""

    def __init__(
        self,
        folder: Path,
        count: int,
        words: Sequence[str],
        changes: Mapping[int, Mapping[str, str]],
        on: Hosts | None = None,
    ) -> None:
        self._folder = folder
        shared = {} if on is None else {"MLX_HOSTFILE": on.hostfile(folder)}
        self.processes = [
            subprocess.Popen(
                [*([] if on is None else on.entered(rank)), sys.executable, "-m", "mlx_qwen", *words],
                cwd=ROOT,
                env={**environment, **shared, **changes.get(rank, {})},
                stdin=subprocess.DEVNULL,
                stdout=(folder / f"out{rank}").open("w"),
                stderr=(folder / f"err{rank}").open("w"),
            )
            for rank, environment in enumerate(ring(count, folder))
        ]

    def out(self, rank: int) -> str:
        """What a rank has written to its standard output."""
        return (self._folder / f"out{rank}").read_text()

    def err(self, rank: int) -> str:
        """What a rank has written to its standard error."""
        return (self._folder / f"err{rank}").read_text()

    def url(self) -> str:
        """Where rank 0 listens, as soon as it does."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and all(one.poll() is None for one in self.processes):
            if found := _LISTENING.search(self.err(0)):
                return found[1]
            time.sleep(0.05)
        raise AssertionError([self.err(rank) for rank in range(len(self.processes))])

    def ended(self, patience: float) -> list[int]:
        """The exit codes of all ranks; raises TimeoutExpired where one goes on for longer."""
        end = time.monotonic() + patience
        return [one.wait(max(end - time.monotonic(), 0.01)) for one in self.processes]


@contextmanager
def ranks(
    count: int, *words: object, changes: Mapping[int, Mapping[str, str]] | None = None, on: Hosts | None = None
) -> Iterator[Ranks]:
    """`mlx-qwen` with these words on `count` ranks, which are gone in the end; `changes` of a rank's environment.

    They run `on` hosts of their own, or on this one.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = Ranks(Path(folder), count, [str(word) for word in words], changes or {}, on)
        try:
            yield started
        finally:
            for process in started.processes:
                process.kill()
                process.wait()
