"""A conversion uses every core, and no more memory for a larger checkpoint."""

import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import write as weights
from tests.conftest import CheckpointFactory
from tools.benchmarks.synthetic import write_random_checkpoint

CORES = 4
# As many threads and as small pieces everywhere, so that a small checkpoint has many times what is read at once.
PEAK = """
import os, sys
os.cpu_count = lambda: 2
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import pieces
pieces.PIECE_BYTES = 1 << 20
print(convert(sys.argv[1], sys.argv[2], bits=4, quantizer="rtn").peak_memory)
"""


def test_on_a_cpu_as_many_pieces_are_produced_at_once_as_it_has_cores(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: CORES)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    produce, calls, threads = weights.produce, itertools.count(), set()
    all_at_work = threading.Barrier(CORES)

    def met(piece: weights.Piece, *how: object) -> object:
        if next(calls) < CORES:
            all_at_work.wait(timeout=30)
        threads.add(threading.get_ident())
        return produce(piece, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "produce", met)
    convert(checkpoint("moe"), tmp_path / "out", bits=4)
    assert len(threads) == CORES
    assert next(calls) > 10 * CORES


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    sizes, peaks = [], []
    for factor in (1, 4):
        source = tmp_path / f"{factor}x"
        write_random_checkpoint(reduced("0.8B", num_layers=factor, changes={"vocab_size": 8192 * factor}), source)
        sizes.append(sum(file.stat().st_size for file in source.glob("*.safetensors")))
        command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / f"{factor}x-out")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert sizes[1] > 3 * sizes[0]
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 4
