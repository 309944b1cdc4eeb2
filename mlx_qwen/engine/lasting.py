"""Threads that do not end before Python does, as all must that use MLX.

MLX keeps Python objects for each thread, such as its random state and the graphs that it compiled, and lets go of them
as the thread ends. Where the interpreter has ended by then the process aborts, and before Python 3.13 joining a thread
does not wait for it. So these threads fall asleep for good at the interpreter's end, and end with the process.
"""

import asyncio
import atexit
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from operator import call
from os import cpu_count
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import ParamSpec, TypeVar

from mlx_qwen.forked import note_computing

P = ParamSpec("P")
T = TypeVar("T")
# Seconds to wait at the interpreter's end for what a thread is doing.
_PATIENCE = 30.0
_MOST = min(32, (cpu_count() or 1) + 4)


class LastingThread(Thread):
    """A daemon thread that runs `work`, and does not end behind it but sleeps."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._asleep, self._never = Lock(), Lock()
        self._asleep.acquire()
        self._never.acquire()

    def run(self) -> None:
        """Does the work, and never returns."""
        self._work()
        # One call: whoever waits for the sleep cannot run before it has begun.
        steps: tuple[Callable[[], object], ...] = (self._asleep.release, self._never.acquire)
        deque(map(call, steps), maxlen=0)

    def wait(self) -> None:
        """Waits until it sleeps, at the interpreter's end."""
        self._asleep.acquire(timeout=_PATIENCE)


class _Helpers:
    """As many threads as there is work for at the same time, up to a limit."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = Semaphore(0)
        self._threads: list[LastingThread] = []

    def submit(self, job: Callable[[], None]) -> None:
        note_computing()
        self._jobs.put(job)
        if not self._idle.acquire(blocking=False) and len(self._threads) < _MOST:
            if not self._threads:
                atexit.register(self._end)
            self._threads.append(LastingThread(self._run, "mlx-qwen helper"))
            self._threads[-1].start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job
            self._idle.release()

    def _end(self) -> None:
        threads = [thread for thread in self._threads if thread.is_alive()]  # none in a forked process
        for _ in threads:
            self._jobs.put(None)
        for thread in threads:
            thread.wait()


_helpers = _Helpers()


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What `work` returns, done in a thread of these while the event loop goes on, as by `asyncio.to_thread`.

    Raises:
        MLXQwenError: the process was forked from one that had computed before; beside what `work` raises.
    """
    made: Future[T] = Future()

    def job() -> None:
        if made.set_running_or_notify_cancel():
            try:
                made.set_result(work(*args, **kwargs))
            except BaseException as error:
                made.set_exception(error)

    _helpers.submit(job)
    return await asyncio.wrap_future(made)
