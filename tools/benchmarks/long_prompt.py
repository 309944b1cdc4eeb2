"""A long prompt on a small model: its memory beside `plan`, its answer by piece size, and going back to it."""

import time
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_qwen.bench.table import Table
from mlx_qwen.config import TextConfig
from mlx_qwen.convert.planning.memory import Needs
from mlx_qwen.engine.engine import Engine
from mlx_qwen.engine.memory import sequence_bytes
from mlx_qwen.engine.prefix import PrefixIndex
from mlx_qwen.model import Model
from tools.benchmarks.small_model import small_config
from tools.benchmarks.stepping import computed, drained, request

_PIECES = (512, 2048)
_ANSWER = 8


class Read(NamedTuple):
    """A prompt that was read: seconds, bytes of its state, the most bytes beside the weights, and its answer."""

    seconds: float
    state: int
    peak: int
    answer: list[int]


def bench_long(*, tokens: int = 100_000) -> Table:
    """Read a prompt of `tokens` tokens, a tenth of it, and the whole again from where it was remembered."""
    config = small_config(4, hidden_size=64, intermediate_size=64, heads=2, head_dim=32)
    model = Model(config, with_mtp=False)
    mx.eval(model.parameters())
    return computed(lambda: _measured(model, tokens))


def _measured(model: Model, tokens: int) -> Table:
    ids = np.random.default_rng(0).integers(0, 1024, tokens).tolist()
    rows, answers = [], []
    for count in (tokens // 10, tokens):
        for piece in _PIECES:
            engine = Engine(model, prefixes=PrefixIndex(1 << 34))
            read = _read(engine, ids[:count], piece)
            rows.append((f"{count:,} in pieces of {piece:,}", *_shown(read, count, piece, model.config.text)))
            answers.append((count, tuple(read.answer)))
    again = _read(engine, ids, _PIECES[-1])
    share = f"{100 * again.seconds / read.seconds:.2f} % of the time"
    rows.append((f"{tokens:,} once more", share, "", "", ""))
    same = len(set(answers)) == len({count for count, _ in answers}) and again.answer == read.answer
    note = (
        f"4 layers of width 64, fp32, greedy; {_ANSWER} tokens of answer "
        f"{'are the same for every piece size and from memory' if same else 'DIFFER between piece sizes'}. State: "
        "keys, values and fixed parts; planned as the engine counts them. The peak is beside the weights, once the "
        "prompt is read; planned is what `plan` estimates for a GPU, in fp32."
    )
    header = ("prompt", "ms a token", "state, MiB", "of the plan", "peak / planned, MiB")
    return Table("A long prompt", note, header, rows)


def _read(engine: Engine, ids: list[int], piece: int) -> Read:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sequence = request(engine.model, ids, max_tokens=_ANSWER)
    sequence.step_size = piece
    engine.submit(sequence)
    started = time.perf_counter()
    while not sequence.written:
        engine.step()
    seconds = time.perf_counter() - started
    assert sequence.state is not None, "it has read its prompt"
    peak, state = mx.get_peak_memory() - before, sequence.state.nbytes
    while sequence.finish_reason is None:
        engine.step()
    drained(sequence)
    return Read(seconds, state, peak, sequence.written)


def _shown(read: Read, tokens: int, piece: int, text: TextConfig) -> tuple[str, str, str, str]:
    planned = sequence_bytes(text, tokens, item_size=4)
    peak = Needs(text, piece, None, item_size=4).reading(tokens)
    return (
        f"{1e3 * read.seconds / tokens:.3f}",
        f"{read.state / 2**20:.1f}",
        f"{read.state / planned:.3f}",
        f"{read.peak / 2**20:.1f} / {peak / 2**20:.1f}",
    )
