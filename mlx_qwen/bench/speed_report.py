"""What `compare_speed` found, for people and for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median

from mlx_qwen.bench.process import Turn
from mlx_qwen.bench.speed import KERNELS_OFF, Bar, Speed
from mlx_qwen.bench.table import Table
from mlx_qwen.bench.timing import OURS


def speed_table(speed: Speed, notes: Sequence[str]) -> Table:
    """Medians with their ranges, and how many times the peers' are ours."""
    names = [name for name in speed.turns if name not in speed.failures]
    others = [name for name in names if name != OURS]
    spreads = {name: speed.spread(name) for name in names}
    rows = [
        (f"{what}, tokens/s", *(_rate(spreads[name][what]) for name in names), *_ratios(spreads, what, others))
        for what in spreads[OURS]
    ]
    for label, show in (("import, load, first token", _loading), ("peak memory of MLX", _memory)):
        rows.append((label, *(show(speed.turns[name]) for name in names), *("" for _ in others)))
    turns = len(speed.turns[OURS])
    how = (
        f"Medians of {turns} turns in alternation (least to most), each in a process of its own; "
        f"{speed.generated_tokens} tokens decoded greedily after each prompt, the first counting as prefill."
    )
    text = "\n".join([how, *notes, *(f"Left out: {reason}" for reason in speed.failures.values())])
    header = ("", *names, *(f"ours / {_short(name)}" for name in others))
    return Table("Prefill and decode", text, header, rows)


def kernels_table(speed: Speed) -> Table:
    """Which operations ran as Metal kernels and which as plain MLX, and why, in the last turn of this project."""
    rows = []
    for name, calls in sorted(speed.turns[OURS][-1].kernels.items()):
        reasons = calls.reference
        rows.append((name, str(calls.kernel), str(sum(reasons.values())), ", ".join(reasons)))
    note = "Calls that built a graph; a graph that is replayed counts once."
    return Table("Kernels", note, ("operation", "kernel", "plain MLX", "because"), rows)


def speed_json(speed: Speed) -> dict[str, object]:
    """Every sample, as JSON types."""
    turns = {name: [asdict(turn) for turn in turns] for name, turns in speed.turns.items()}
    medians = {
        name: {what: asdict(bar) for what, bar in speed.spread(name).items()}
        for name in turns
        if name not in speed.failures
    }
    return {
        "prompt_tokens": list(speed.prompt_tokens),
        "generated_tokens": speed.generated_tokens,
        "tokens_per_second": medians,
        "turns": turns,
        "failures": dict(speed.failures),
    }


def _rate(bar: Bar) -> str:
    return f"{bar.value:,.1f} ({bar.low:,.1f}–{bar.high:,.1f})"


def _ratios(spreads: dict[str, dict[str, Bar]], what: str, others: Sequence[str]) -> list[str]:
    return [f"{spreads[OURS][what].value / spreads[name][what].value:.2f}" for name in others]


def _short(name: str) -> str:
    return "kernels off" if name == KERNELS_OFF else name


def _loading(turns: Sequence[Turn]) -> str:
    return f"{median(turn.load_seconds for turn in turns):.2f} s"


def _memory(turns: Sequence[Turn]) -> str:
    return f"{median(turn.peak_memory for turn in turns) / 1e9:.3f} GB"
