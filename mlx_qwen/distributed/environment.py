"""Whether this process is one of several, as MLX's launchers say in the environment, and how it joins the others."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from typing import TYPE_CHECKING

from mlx_qwen.errors import MLXQwenError

if TYPE_CHECKING:
    import mlx.core as mx

# mlx.launch sets the first for its ring, for jaccl and for nccl; MPI's launchers set the others.
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
_PLACES = ("MLX_HOSTFILE", "MLX_JACCL_COORDINATOR", "MLX_WORLD_SIZE", *_RANKS[1:])
# Seconds for all ranks to come: hosts are reached by ssh and read Python's packages from cold disks.
JOINING = 60.0


def own_rank() -> int | None:
    """This process's number among those that were launched together; None where it was started by itself."""
    if not any(_said(name) for name in _PLACES):
        return None
    value = next((os.environ[name] for name in _RANKS if name in os.environ), None)
    return int(value) if value is not None and value.isdecimal() else None


def _said(name: str) -> bool:
    """Whether the launcher says something there: of a single host it says nothing, in an empty file."""
    value = os.environ.get(name, "")
    if name != "MLX_HOSTFILE" or not value:
        return bool(value)
    try:
        return os.path.getsize(value) > 2  # noqa: PTH202, a path that is none of ours
    except OSError:
        return True


def joined(seconds: float = JOINING) -> "mx.distributed.Group":
    """The group of all ranks.

    Raises MLXQwenError where MLX can connect none, or they do not come together within `seconds`.
    """
    import mlx.core as mx

    began = time.monotonic()
    with _interrupted(seconds):
        try:
            return mx.distributed.init(strict=True)
        except (RuntimeError, ValueError) as error:
            late = time.monotonic() - began >= seconds
            why = (
                f"The ranks did not come together within {seconds:.0f} s."
                if late
                else f"MLX cannot connect the ranks: {error}"
            )
            raise MLXQwenError(f"{why} {_ADVICE}") from error


@contextmanager
def _interrupted(seconds: float) -> Iterator[None]:
    """Lets a call of the system fail that takes longer: MLX waits for ranks so that no other thread of Python runs."""
    if current_thread() is not main_thread():
        yield
        return
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def within(seconds: float, otherwise: Callable[[], None]) -> Iterator[None]:
    """Calls `otherwise`, in another thread, where what is done here takes longer."""
    timer = Timer(seconds, otherwise)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_ADVICE = (
    "Look at the hostfile (each rank's own addresses), the firewall, and whether the command starts on every host "
    "(mlx.launch --verbose says more)."
)
