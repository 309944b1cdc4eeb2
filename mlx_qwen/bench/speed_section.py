"""The comparison of speed as a section: measured, put into tables, and drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.bench.chart import save_plot
from mlx_qwen.bench.machine import machine_facts
from mlx_qwen.bench.section import Section, section_of
from mlx_qwen.bench.speed import compare_speed, has_kernels
from mlx_qwen.bench.speed_report import kernels_table, speed_json, speed_table
from mlx_qwen.bench.subject import Subject


@dataclass(frozen=True, slots=True)
class SpeedRun:
    """What a comparison of speed was asked for.

    Attributes:
        prompt_tokens, generate_tokens: sizes of the prompts, and tokens written after each.
        kernels_on_off: measure this project's runtime with plain MLX too, where there are kernels.
        vs: peers to measure.
        repeats: turns of each candidate.
        plot: a picture file to draw, or none.
    """

    prompt_tokens: tuple[int, ...]
    generate_tokens: int
    kernels_on_off: bool
    vs: tuple[str, ...]
    repeats: int
    plot: Path | None


def speed_section(measured: Subject, run: SpeedRun, progress: Callable[[str], None]) -> Section:
    """Prefill and decode of `measured`; `progress` is told who has the turn."""
    notes = list(measured.notes)
    if run.kernels_on_off and not has_kernels():
        notes.append("Kernels on and off: not available here, as there is no Metal GPU; plain MLX did all the work.")
    speed = compare_speed(
        measured.folder,
        prompt_tokens=run.prompt_tokens,
        generate_tokens=run.generate_tokens,
        peers=run.vs,
        kernels_off=run.kernels_on_off and has_kernels(),
        repeats=run.repeats,
        progress=progress,
    )
    if run.plot is not None:
        facts = machine_facts()
        note = f"{facts['chip']}, mlx {facts['mlx']}; medians of {run.repeats} turns with their ranges"
        save_plot(speed, run.plot, measured.name, note)
    tables = [speed_table(speed, notes), kernels_table(speed)]
    return section_of(tables, {"model": measured.name, "notes": notes, **speed_json(speed)})
