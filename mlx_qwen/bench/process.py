"""One turn of one runtime in a process of its own: `python -m mlx_qwen.bench.process RUNTIME FOLDER TOKENS SIZE...`.

It prints one line of JSON, the fields of `Turn`. A process a turn means that no runtime finds memory, compiled kernels
or imports of another's, and that only one model is in memory at a time.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import mlx.core as mx

from metal_kernels import OpStats, stats
from mlx_qwen.bench.runtimes import RUNTIMES, Writer
from mlx_qwen.json_files import read_json_object


@dataclass(frozen=True, slots=True)
class Timed:
    """Times of one prompt: seconds until the first token, and seconds of the tokens after it."""

    prompt_tokens: int
    prefill_seconds: float
    decoded_tokens: int
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What one process measured.

    Attributes:
        load_seconds: imports and weights, until the model has written its first token.
        peak_memory: the most that MLX held, in bytes.
        prompts: one entry a size of prompt.
        kernels: calls by operation; only this project's runtime has any.
    """

    load_seconds: float
    peak_memory: int
    prompts: list[Timed]
    kernels: dict[str, OpStats]


def measure(runtime: str, folder: Path, sizes: Sequence[int], count: int) -> Turn:
    """Load `folder` in the runtime, then read a prompt of every size and write `count` tokens after it.

    Every size is run once untimed, so that kernels are compiled and graphs traced.
    """
    started = time.perf_counter()
    write = RUNTIMES[runtime](folder)
    next(write([1, 2, 3], 1))
    loaded = time.perf_counter() - started
    vocabulary = _plain_tokens(folder)
    prompts, random = [], Random(0)
    for size in sizes:
        ids = [random.randrange(vocabulary) for _ in range(size)]
        _timed(write, ids, min(count, 8))
        prompts.append(_timed(write, ids, count))
    return Turn(loaded, mx.get_peak_memory(), prompts, stats())


def _timed(write: Writer, ids: list[int], count: int) -> Timed:
    started = time.perf_counter()
    tokens = write(ids, count)
    next(tokens)
    first = time.perf_counter()
    written = sum(1 for _ in tokens)
    return Timed(len(ids), first - started, written, time.perf_counter() - first)


def _plain_tokens(folder: Path) -> int:
    """How many of the first ids are plain text: Qwen's special tokens are at the end of the vocabulary."""
    config = read_json_object(folder / "config.json")
    text = config.get("text_config", config)
    return int(text["vocab_size"]) // 2


def main() -> None:
    """Measure what the arguments say."""
    runtime, folder, count, *sizes = sys.argv[1:]
    turn = measure(runtime, Path(folder), [int(size) for size in sizes], int(count))
    print(json.dumps(asdict(turn)))


if __name__ == "__main__":
    main()
