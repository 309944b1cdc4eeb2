"""Going back to a long prefix: what that costs beside reading it, from memory and from a folder."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.engine.prefix_files import PrefixFiles
from mlx_qwen.model import Model
from mlx_qwen.model.state import StateKind
from tools.benchmarks.small_model import small_config
from tools.benchmarks.stepping import computed, drained, request

_PREFIX = 16_384


def bench_restoring(folder: Path, *, repeats: int = 3) -> Table:
    """Read a prefix of 16k tokens once, then go back to it, in memory and by one who knows only the folder."""
    model = Model(small_config(8, hidden_size=256, intermediate_size=768, heads=8, head_dim=64), with_mtp=False)
    mx.eval(model.parameters())
    with tempfile.TemporaryDirectory(dir=folder) as kept:
        return computed(lambda: _measured(model, Path(kept), repeats))


def _measured(model: Model, folder: Path, repeats: int) -> Table:
    ids = np.random.default_rng(0).integers(0, 1024, _PREFIX).tolist()
    engine = Engine(model, prefixes=PrefixIndex(1 << 34))
    seconds, first, _ = _asked(engine, ids)
    rows = [("reading it", f"{seconds:.3f}", "100 %")]
    held = [
        _timed(lambda: engine.store.find(request(model, [*ids, 5], max_tokens=1), StateKind())) for _ in range(repeats)
    ]
    rows.append(("going back to it in memory", *_beside(min(held), seconds)))
    found = engine.store.find(request(model, ids, max_tokens=1), StateKind())
    assert found is not None and found.length == _PREFIX, "it was read"
    files = PrefixFiles(folder, "bench", most_bytes=1 << 40)
    files.put(ids, found.state)
    files.close()
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    read = [_timed(lambda: PrefixFiles(folder, "bench", most_bytes=1 << 40).take(ids)) for _ in range(repeats)]
    rows.append((f"going back to it from a folder, {nbytes / 2**20:.0f} MiB", *_beside(min(read), seconds)))
    again, answer, computed_tokens = _asked(engine, ids)
    assert answer == first, "the answer is the same"
    rows.append((f"the same prompt again, {computed_tokens} of its tokens computed", *_beside(again, seconds)))
    note = (
        f"8 layers of width 256, fp32, a prefix of {_PREFIX:,} tokens. Times until the first token, for going back "
        f"those of the lookup and of the files, the least of {repeats}; the files are in the system's cache."
    )
    return Table("Going back to a prefix", note, ("", "seconds", "of reading it"), rows)


def _asked(engine: Engine, ids: list[int]) -> tuple[float, list[int], int]:
    """Seconds until the first token, the answer, and how many of the prompt's tokens were computed."""
    sequence = request(engine.model, ids, max_tokens=4)
    engine.submit(sequence)
    seconds = _timed(lambda: _until_first(engine, sequence.written))
    while sequence.finish_reason is None:
        engine.step()
    drained(sequence)
    return seconds, sequence.written, len(ids) - sequence.cached


def _until_first(engine: Engine, written: list[int]) -> None:
    while not written:
        engine.step()


def _timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _beside(seconds: float, reading: float) -> tuple[str, str]:
    return f"{seconds:.4f}", f"{100 * seconds / reading:.2f} %"
