"""Device bytes of every kernel, where the emulator that counts them is at hand: in a checkout of the sources."""

import subprocess
import sys
from pathlib import Path

from mlx_qwen.errors import MLXQwenError

_CHECKOUT = Path(__file__).resolve().parents[2]
_MODULE = "tests.metal_kernels.bytes_moved"


def bench_kernel_bytes() -> str:
    """Tables of bytes moved beside the minimum, for decode and prefill; a sentence where they cannot be made."""
    if not (_CHECKOUT / _MODULE.replace(".", "/")).with_suffix(".py").exists():
        return "Device bytes of kernels are counted by the tests' emulator: run this in a checkout of the sources.\n"
    done = subprocess.run([sys.executable, "-m", _MODULE], cwd=_CHECKOUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MLXQwenError(f"Counting device bytes failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
