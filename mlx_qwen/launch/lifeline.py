"""`python -m mlx_qwen.launch.lifeline …` is `mlx-qwen …` for as long as whoever holds its standard input lives."""

import os
import runpy
import signal
import sys
from threading import Thread


def _end_with_holder() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    Thread(target=_end_with_holder, daemon=True).start()
    runpy.run_module("mlx_qwen", run_name="__main__", alter_sys=True)
