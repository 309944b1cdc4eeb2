"""The one thread that computes: MLX's lazy arrays belong to the thread that made them."""

import atexit
from threading import Condition, Lock
from typing import Protocol

from mlx_qwen.engine.lasting import LastingThread
from mlx_qwen.forked import note_computing


class Worker(Protocol):
    """Something with work to do, a step at a time."""

    def step(self) -> bool:
        """Do a step; whether there is more to do now."""


class _Computing:
    """A thread that gives every worker with work a step in turn, and sleeps while none has any."""

    def __init__(self) -> None:
        # An interrupt that comes between its methods leaves a condition's lock taken, but none that is taken itself.
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._busy: dict[int, Worker] = {}
        self._again: set[int] = set()
        self._thread: LastingThread | None = None
        self._ending = False

    def wake(self, worker: Worker) -> None:
        """Let `worker` step until it says that it has no more to do."""
        note_computing()
        with self._lock:
            if self._ending:
                return
            self._busy[id(worker)] = worker
            self._again.add(id(worker))
            if self._thread is None or not self._thread.is_alive():
                self._thread = LastingThread(self._run, "mlx-qwen engine")
                self._thread.start()
                atexit.register(self._end, self._thread)
            self._changed.notify()

    def _end(self, thread: LastingThread) -> None:
        """Let the interpreter end only when no step is half done, and nothing can wake the thread any more."""
        if thread.is_alive():  # it is not, in a forked process
            with self._lock:
                self._ending = True
                self._changed.notify_all()
            thread.wait()

    def _run(self) -> None:
        while turn := self._next_turn():
            for worker in turn:
                if self._ending:
                    break
                if worker.step():
                    continue
                with self._lock:
                    # Woken meanwhile, it may have found something to do.
                    if id(worker) not in self._again:
                        self._busy.pop(id(worker), None)
            del turn, worker

    def _next_turn(self) -> list[Worker]:
        """The workers with work, once there are any; none at the interpreter's end."""
        with self._lock:
            self._changed.wait_for(lambda: self._busy or self._ending)
            self._again.clear()
            return [] if self._ending else list(self._busy.values())


_computing = _Computing()


def wake(worker: Worker) -> None:
    """Let `worker` step in the computing thread until it has no more to do; from any thread.

    Raises:
        MLXQwenError: the process was forked from one that had computed before.
    """
    _computing.wake(worker)
