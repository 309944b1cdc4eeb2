"""The one thread that computes: MLX's lazy arrays belong to the thread that made them."""

import atexit
from threading import Condition, Thread
from typing import Protocol

from mlx_qwen.forked import note_computing

# Seconds to wait at the interpreter's end for the step that is being computed.
_PATIENCE = 10.0


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
        self._ending = self._stepping = False

    def wake(self, worker: Worker) -> None:
        """Let `worker` step until it says that it has no more to do."""
        note_computing()
        with self._changed:
            if self._ending:
                return
            self._busy[id(worker)] = worker
            self._again.add(id(worker))
            if self._thread is None:
                self._thread = Thread(target=self._run, name="mlx-qwen engine", daemon=True)
                self._thread.start()
                atexit.register(self._end)
            self._changed.notify()

    def _end(self) -> None:
        """Let the interpreter end only when no step is half done.

        The thread itself stays, asleep, and is not woken any more: MLX aborts where a thread that has streams ends.
        """
        with self._changed:
            self._ending = True
            self._changed.wait_for(lambda: not self._stepping, _PATIENCE)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._busy and not self._ending)
                self._stepping = True
                turn = list(self._busy.values())
                self._again.clear()
            for worker in turn:
                if self._ending:
                    break
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
