"""Which limits of MLX's command buffers a model decodes fastest with: each tried in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.bench.process import Turn
from mlx_qwen.bench.speed import run_turn
from mlx_qwen.bench.timing import OURS
from mlx_qwen.command_buffers import Limits, candidates, environment, remember_limits
from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.machine import chip_name, machine_bytes

_TURNS, _PROMPT, _WRITTEN = 2, 2048, 128
# MLX's own limits stay unless others save at least a hundredth.
_WORTH = 0.99
Run = Callable[[Limits | None], Turn]


@dataclass(frozen=True, slots=True)
class Tried:
    """One candidate: milliseconds a decoded token and the most bytes that MLX held, or why it could not run."""

    limits: Limits | None
    token_ms: float = 0.0
    peak_memory: int = 0
    failure: str | None = None


def tune_command_buffers(folder: Path, run: Run | None = None) -> list[Tried]:
    """Try MLX's own limits and others, and have later processes use the best: the first of what is returned.

    Nothing is tried, nor returned, on a machine without Apple's chips.

    Args:
        folder: of the model that reads a prompt and decodes.
        run: measures one candidate; by default in a new process, since MLX reads its limits once.
    """
    wanted = candidates(chip_name(), machine_bytes())
    if len(wanted) == 1:
        return []
    limit = ModelConfig.from_directory(folder).text.max_position_embeddings
    size = min(_PROMPT, limit // 2)

    def turn(limits: Limits | None) -> Turn:
        return run_turn(OURS, folder, [size], min(_WRITTEN, limit - size), environment(limits))

    turns: dict[Limits | None, list[Turn | str]] = {limits: [] for limits in wanted}
    for _ in range(_TURNS):
        for limits, found in turns.items():
            try:
                found.append((run or turn)(limits))
            except MLXQwenError as error:
                found.append(str(error))
    tried = [_summed(limits, found) for limits, found in turns.items()]
    best = _best(tried)
    remember_limits(best.limits)
    return [best, *(each for each in tried if each is not best)]


def buffer_table(tried: Sequence[Tried]) -> str:
    """A line a candidate; the first is the one that is used."""
    lines = [f"{'command buffers':<34}{'a token':<14}most memory"]
    for place, each in enumerate(tried):
        name = "MLX's own" if each.limits is None else f"{each.limits.operations} ops, {each.limits.megabytes} MB"
        values = f"{each.token_ms:.2f} ms".ljust(14) + f"{each.peak_memory / 1e9:.2f} GB"
        lines.append(f"{name + (', used' if place == 0 else ''):<34}{each.failure or values}")
    return "\n".join(lines)


def _summed(limits: Limits | None, turns: Sequence[Turn | str]) -> Tried:
    failures = [turn for turn in turns if isinstance(turn, str)]
    if failures:
        return Tried(limits, failure=failures[0])
    done = [turn for turn in turns if isinstance(turn, Turn)]
    fastest = min(turn.prompts[0].decode_seconds / turn.prompts[0].decoded_tokens for turn in done)
    return Tried(limits, 1e3 * fastest, max(turn.peak_memory for turn in done))


def _best(tried: Sequence[Tried]) -> Tried:
    own, *others = tried
    sound = [each for each in others if each.failure is None]
    best = min(sound, key=lambda each: each.token_ms, default=own)
    return best if own.failure is not None or best.token_ms < _WORTH * own.token_ms else own
