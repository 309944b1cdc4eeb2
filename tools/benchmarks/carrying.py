"""The process that carries packets between the hosts of `far_hosts`, each after the delay."""

import gc
import os
import select
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from time import perf_counter

from tools.benchmarks.far_hosts import Delay

_LARGEST = 1 << 16
# Timers are late by some tens of microseconds: the last of a packet's wait is spent looking at the clock.
_LATE = 1e-4


def carry(devices: list[int], delay: Delay, until: int) -> None:
    """Carry IPv4 packets between devices, of which the first has the address that ends in 1, and so on.

    Ends as soon as something can be read from `until`, its end included.
    """
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        left = waiting[0][0] - perf_counter() if waiting else None
        ready, _, _ = select.select([*devices, until], [], [], None if left is None else max(left - _LATE, 0))
        if until in ready:
            return
        due = perf_counter() + delay.seconds
        for device in ready:
            with suppress(BlockingIOError):
                while packet := os.read(device, _LARGEST):
                    if packet[0] >> 4 == 4 and 0 < packet[19] <= len(devices):
                        waiting.append((due, devices[packet[19] - 1], packet))
        while waiting and waiting[0][0] <= perf_counter():
            _, device, packet = waiting.popleft()
            with suppress(BlockingIOError):
                os.write(device, packet)


def main() -> None:
    """The words are the file of the delay, then descriptors: what ends it, and the devices."""
    file, until, *devices = sys.argv[1:]
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()
    carry([int(device) for device in devices], Delay(Path(file)), int(until))


if __name__ == "__main__":
    main()
