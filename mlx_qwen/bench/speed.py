"""Prefill and decode of one checkpoint by every runtime asked for, in alternation."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from metal_kernels import OpStats
from mlx_qwen.bench.process import Timed, Turn
from mlx_qwen.bench.runtimes import RUNTIMES
from mlx_qwen.bench.timing import OURS
from mlx_qwen.command_buffers import as_users_have_it
from mlx_qwen.errors import MLXQwenError

KERNELS_OFF = f"{OURS}, kernels off"
_SWITCH = "MLX_QWEN_KERNELS"


@dataclass(frozen=True, slots=True)
class Bar:
    """A median, and the least and most it was taken from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured.

    Attributes:
        prompt_tokens: the sizes of the prompts.
        generated_tokens: written after each.
        turns: of every candidate, in the order of the turns; none where it failed.
        failures: why a candidate failed, by name.
    """

    prompt_tokens: tuple[int, ...]
    generated_tokens: int
    turns: Mapping[str, Sequence[Turn]]
    failures: Mapping[str, str]

    def measured(self, name: str) -> dict[str, list[float]]:
        """Every sample of a candidate by what was measured; tokens a second."""
        found: dict[str, list[float]] = {}
        for place, size in enumerate(self.prompt_tokens):
            prompts = [turn.prompts[place] for turn in self.turns[name]]
            found[f"prefill of {size:,}"] = [timed.prompt_tokens / timed.prefill_seconds for timed in prompts]
            found[f"decode after {size:,}"] = [timed.decoded_tokens / timed.decode_seconds for timed in prompts]
        return found

    def spread(self, name: str) -> dict[str, Bar]:
        """The median of every list of samples in `measured`, with the least and the most."""
        return {what: summary(samples) for what, samples in self.measured(name).items() if samples}


def summary(samples: Sequence[float]) -> Bar:
    """The median and the range of some samples."""
    return Bar(statistics.median(samples), min(samples), max(samples))


def compare_speed(
    folder: Path,
    *,
    prompt_tokens: Sequence[int],
    generate_tokens: int,
    peers: Sequence[str],
    kernels_off: bool,
    repeats: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Speed:
    """Measure a folder that every runtime can load.

    The candidates take turns, each turn in a process of its own. A peer that fails is left out and reported.

    Args:
        folder: in Hugging Face or MLX layout.
        prompt_tokens: sizes of the prompts, each read from an empty cache.
        generate_tokens: written greedily after each prompt, at least 2; end tokens do not stop it.
        peers: "mlx-lm" and "mlx-vlm" are known.
        kernels_off: measure this project's runtime a second time with plain MLX instead of its kernels.
        repeats: turns of each candidate.
        progress: told what is being measured.

    Raises:
        MLXQwenError: this project's own runtime failed.
    """
    candidates = [OURS, *([KERNELS_OFF] if kernels_off else []), *peers]
    turns: dict[str, list[Turn]] = {name: [] for name in candidates}
    failures: dict[str, str] = {}
    for repeat in range(repeats):
        for name in candidates:
            if name in failures:
                continue
            progress(f"turn {repeat + 1} of {repeats}: {name}")
            try:
                turns[name].append(_turn(name, folder, prompt_tokens, generate_tokens))
            except MLXQwenError as error:
                if name == OURS:
                    raise
                failures[name] = str(error)
                turns[name].clear()
    return Speed(tuple(prompt_tokens), generate_tokens, turns, failures)


def has_kernels() -> bool:
    """Whether there is a Metal GPU that this project's kernels run on."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def _turn(name: str, folder: Path, sizes: Sequence[int], count: int) -> Turn:
    runtime = name if name in RUNTIMES else OURS
    if name in (OURS, KERNELS_OFF):
        environment = {**os.environ, **({_SWITCH: "reference"} if name == KERNELS_OFF else {})}
    else:
        environment = as_users_have_it()
    return run_turn(runtime, folder, sizes, count, environment)


def run_turn(runtime: str, folder: Path, sizes: Sequence[int], count: int, environment: Mapping[str, str]) -> Turn:
    """What `mlx_qwen.bench.process` measures in a process with this environment.

    Raises:
        MLXQwenError: the runtime failed.
    """
    arguments = [runtime, str(folder), str(count), *map(str, sizes)]
    command = [sys.executable, "-m", "mlx_qwen.bench.process", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MLXQwenError(f"{runtime} could not run this model: {lines[-1][:500]}")
    found = json.loads(done.stdout.splitlines()[-1])
    prompts = [Timed(**timed) for timed in found["prompts"]]
    kernels = {operation: OpStats(**calls) for operation, calls in found["kernels"].items()}
    return Turn(found["load_seconds"], found["peak_memory"], prompts, kernels)
