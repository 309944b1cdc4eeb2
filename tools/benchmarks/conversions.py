"""Time and peak memory of conversions to 4 bits, beside mlx-lm's, each run in a process of its own."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS, PEER
from mlx_qwen.checkpoint.released import reduced, released
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import MLXQwenError
from tools.benchmarks.peer import WITHOUT_TORCH
from tools.benchmarks.synthetic import write_random_checkpoint

Shape = Literal["0.8B", "35B-slice"]

_CONVERTERS = {
    OURS: "from mlx_qwen.convert import convert; import sys; convert(sys.argv[1], sys.argv[2], bits=4)\n",
    PEER: (
        f"{WITHOUT_TORCH}from mlx_lm import convert; "
        "convert(sys.argv[1], sys.argv[2], quantize=True, q_bits=4, q_group_size=64)\n"
    ),
}
DEFAULT = f"{OURS}, without further words"
_WITH_DEFAULT = {
    **_CONVERTERS,
    DEFAULT: "from mlx_qwen.convert import convert; import sys; convert(sys.argv[1], sys.argv[2])\n",
}
# Linux passes the parent's peak on to ru_maxrss, but not to VmHWM.
_PRINT_PEAK = """
import os, resource, sys
if os.path.exists("/proc/self/status"):
    print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
_NOTES = {
    "0.8B": "A random bf16 checkpoint of 0.8B's shape; mlx-lm leaves out vision and MTP.",
    "35B-slice": "4 decoder layers of 35B-A3B with all 256 experts and a quarter of the vocabulary, random bf16.",
}


def bench_conversion(shape: Shape, workdir: Path, *, repeats: int = 3) -> Table:
    """Make a random bf16 checkpoint of a released shape in `workdir` and convert it to 4 bits with both converters.

    Ours does so once more without further words, which measures the matrices first and chooses their bits.

    "0.8B" is the whole model, 1.7 GB; "35B-slice" is 4 decoder layers of 35B-A3B, 7.3 GB. The table shows medians over
    `repeats` turns: wall time of the whole process, and its peak resident memory above that of a bare interpreter. What
    was made is removed again. Raises MLXQwenError when a converter fails.
    """
    source = workdir / f"{shape}-source"
    try:
        write_random_checkpoint(bench_config(shape), source)
        write_tokenizer(source)
        idle = _run("")[1]
        runs: dict[str, list[tuple[float, int]]] = {name: [] for name in _WITH_DEFAULT}
        sizes = {}
        for _ in range(repeats):
            for i, (name, code) in enumerate(_WITH_DEFAULT.items()):
                target = workdir / f"{shape}-{i}"
                seconds, peak = _run(code, source, target)
                runs[name].append((seconds, peak - idle))
                sizes[name] = _weight_bytes(target)
                shutil.rmtree(target)
        return _table(shape, _weight_bytes(source), runs, sizes)
    finally:
        shutil.rmtree(source, ignore_errors=True)


def bench_conversion_memory(workdir: Path, *, layers: int = 4, vocab_size: int = 32768) -> Table:
    """How the peak memory of a conversion grows with the checkpoint: random ones of 1, 2 and 4 times the size.

    They have 0.8B's layers, `layers` of them at first, and embeddings of `vocab_size` rows; both are multiplied, so
    that the largest tensor grows too: 0.24, 0.47 and 0.94 GB as it stands. Peaks as in `bench_conversion`, each of one
    run. What was made is removed again. Raises MLXQwenError when a converter fails.
    """
    idle = _run("")[1]
    rows, peaks = [], []
    for factor in (1, 2, 4):
        source, target = workdir / f"{factor}x-source", workdir / f"{factor}x-output"
        try:
            config = reduced("0.8B", num_layers=factor * layers, changes={"vocab_size": factor * vocab_size})
            write_random_checkpoint(config, source)
            write_tokenizer(source)
            found = {}
            for name, code in _CONVERTERS.items():
                found[name] = _run(code, source, target)[1] - idle
                shutil.rmtree(target)
            peaks.append(found)
            sizes = (f"{factor}×", f"{_weight_bytes(source) / 1e9:.2f} GB")
            rows.append((*sizes, *(f"{found[name] / 1e6:,.0f} MB" for name in (OURS, PEER))))
        finally:
            shutil.rmtree(source, ignore_errors=True)
    growth = (f"{peaks[-1][name] / peaks[0][name]:.2f}×" for name in (OURS, PEER))
    note = "Peak memory above a bare interpreter, of whole processes that convert random bf16 checkpoints to 4 bits."
    return Table(
        "Memory of a conversion by size", note, ("size", "checkpoint", OURS, PEER), [*rows, ("4× / 1×", "", *growth)]
    )


def bench_config(shape: Shape) -> ModelConfig:
    """The configuration that `bench_conversion` makes a checkpoint of."""
    if shape == "0.8B":
        return released("0.8B")
    # mlx-lm leaves vision and MTP out, so a slice without them is the same work for both.
    return reduced("35B-A3B", num_layers=4, changes={"vocab_size": 65536})


def write_tokenizer(folder: Path) -> None:
    """Write the smallest tokenizer into `folder` that mlx-lm accepts, as it loads one even to convert."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _run(code: str, *arguments: Path) -> tuple[float, int]:
    """Run `code` in a fresh interpreter; returns its wall time in seconds and its peak resident memory in bytes."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code + _PRINT_PEAK, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise MLXQwenError(f"A conversion failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    return seconds, int(done.stdout.split()[-1])


def _table(shape: Shape, source_bytes: int, runs: dict[str, list[tuple[float, int]]], sizes: dict[str, int]) -> Table:
    seconds = {name: statistics.median(run[0] for run in runs[name]) for name in runs}
    peaks = {name: statistics.median(run[1] for run in runs[name]) for name in runs}
    ours = (OURS, DEFAULT)
    rows = [
        (
            "time",
            *(f"{seconds[name]:.1f} s" for name in runs),
            *(f"{seconds[name] / seconds[PEER]:.2f}" for name in ours),
        ),
        (
            "peak memory",
            *(f"{peaks[name] / 1e6:,.0f} MB" for name in runs),
            *(f"{peaks[name] / peaks[PEER]:.3f}" for name in ours),
        ),
        ("output", *(f"{sizes[name] / 1e9:.2f} GB" for name in runs), "", ""),
    ]
    note = f"{_NOTES[shape]} {source_bytes / 1e9:.2f} GB; whole processes, medians in alternation."
    return Table(f"Converting {shape} to 4 bits", note, ("", *runs, "ratio", "ratio by default"), rows)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
