"""The one thread that computes: MLX's lazy arrays belong to the thread that made them."""

from collections.abc import Callable
from threading import Condition, Thread
from typing import Protocol

from mlx_qwen.forked import note_computing


class Worker(Protocol):
    """Something with work to do, a step at a time."""

    def step(self) -> bool:
        """Do a step; whether there is more to do now."""


class _Computing:
    """A daemon thread that gives every worker with work a step in turn, and sleeps while none has any."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._busy: dict[int, Worker] = {}
        self._again: set[int] = set()
        self._thread: Thread | None = None

    def wake(self, worker: Worker) -> None:
        """Let `worker` step until it says that it has no more to do."""
        note_computing()
        with self._changed:
            self._busy[id(worker)] = worker
            self._again.add(id(worker))
            if self._thread is None:
                self._thread = Thread(target=self._run, name="mlx-qwen engine", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy)
                turn = list(self._busy.values())
                self._again.clear()
            for worker in turn:
                if worker.step():
                    continue
                with self._changed:
                    # Woken meanwhile, it may have found something to do.
                    if id(worker) not in self._again:
                        self._busy.pop(id(worker), None)
            del turn, worker


_computing = _Computing()


def wake(worker: Worker) -> None:
    """Let `worker` step in the computing thread until it has no more to do; from any thread.

    Raises:
        MLXQwenError: the process was forked from one that had computed before.
    """
    _computing.wake(worker)


class Task:
    """A function to run once in the computing thread."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def step(self) -> bool:
        """Run it."""
        self._run()
        return False
