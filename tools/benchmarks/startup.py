"""Import and load time of a converted 0.8B, each in a fresh interpreter, beside mlx-lm's."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER, median_times
from mlx_qwen.convert import convert
from tools.benchmarks.conversions import bench_config, write_tokenizer
from tools.benchmarks.peer import WITHOUT_TORCH
from tools.benchmarks.synthetic import write_random_checkpoint

_LOAD = {
    OURS: "import sys, mlx_qwen; mlx_qwen.load(sys.argv[1])",
    PEER: f"{WITHOUT_TORCH}import mlx_lm; mlx_lm.load(sys.argv[1])",
}
_IMPORT = {OURS: "from mlx_qwen import generate, load", PEER: f"{WITHOUT_TORCH}from mlx_lm import generate, load"}


def bench_startup(workdir: Path, *, repeats: int = 3) -> Table:
    """Make a random 0.8B in `workdir`, convert it to 4 bits, and time interpreters that import, or import and load."""
    source, folder = workdir / "startup-source", workdir / "startup-4bit"
    write_random_checkpoint(bench_config("0.8B"), source)
    write_tokenizer(source)
    convert(source, folder, overwrite=True, progress=False)
    rows = []
    for what, programs in (("import", _IMPORT), ("import and load", _LOAD)):
        seconds = median_times({name: _interpreter(code, folder) for name, code in programs.items()}, repeats)
        rows.append((what, f"{seconds[OURS]:.2f} s", f"{seconds[PEER]:.2f} s", f"{seconds[OURS] / seconds[PEER]:.2f}"))
    note = "A random 0.8B at 4 bits, weights in memory at the end; whole processes, medians in alternation."
    return Table("Start", note, ("", OURS, PEER, "ratio"), rows)


def _interpreter(code: str, folder: Path) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
