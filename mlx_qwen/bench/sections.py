"""The sections of `mlx-qwen bench` by name; each imports what it measures when it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen.bench.section import Section, section_of


@dataclass(frozen=True, slots=True)
class Run:
    """What the command line asked for.

    Attributes:
        repeats: timed turns of each candidate.
        folder: for checkpoints, which are removed with it.
        model, revision: a folder or repository; None where the section makes its own, or for the bundled demo.
        text: a text file, for `quality` and `recipes`.
        prompt_tokens, generate_tokens, kernels_on_off, vs, plot: of `speed`.
        say: told what goes on, a line at a time.
    """

    repeats: int
    folder: Path
    model: str | None
    revision: str | None
    text: Path | None
    prompt_tokens: tuple[int, ...]
    generate_tokens: int
    kernels_on_off: bool
    vs: tuple[str, ...]
    plot: Path | None
    say: Callable[[str], None]


def _speed(run: Run) -> Section:
    from mlx_qwen.bench.chart import save_plot
    from mlx_qwen.bench.machine import machine_facts
    from mlx_qwen.bench.speed import compare_speed, has_kernels
    from mlx_qwen.bench.speed_report import kernels_table, speed_json, speed_table
    from mlx_qwen.bench.subject import subject

    measured = subject(run.model, run.revision, run.folder, max(run.prompt_tokens) + run.generate_tokens)
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
        progress=run.say,
    )
    if run.plot is not None:
        facts = machine_facts()
        note = f"{facts['chip']}, mlx {facts['mlx']}; medians of {run.repeats} turns with their ranges"
        save_plot(speed, run.plot, measured.name, note)
    tables = [speed_table(speed, notes), kernels_table(speed)]
    return section_of(tables, {"model": measured.name, "notes": notes, **speed_json(speed)})


def _rule(run: Run) -> Section:
    from tools.benchmarks.delta_rule import bench_rule

    return section_of([bench_rule(repeats=run.repeats)])


def _model(run: Run) -> Section:
    from tools.benchmarks.small_model import bench_model

    return section_of([bench_model(repeats=run.repeats)])


def _host(run: Run) -> Section:
    from tools.benchmarks.small_model import bench_host_time

    return section_of([bench_host_time(repeats=3 * run.repeats)])


def _start(run: Run) -> Section:
    from tools.benchmarks.startup import bench_startup

    return section_of([bench_startup(run.folder, repeats=run.repeats)])


def _convert(run: Run) -> Section:
    from tools.benchmarks.conversions import bench_conversion

    return section_of([bench_conversion("0.8B", run.folder, repeats=run.repeats)])


def _convert_moe(run: Run) -> Section:
    from tools.benchmarks.conversions import bench_conversion

    return section_of([bench_conversion("35B-slice", run.folder, repeats=run.repeats)])


def _convert_memory(run: Run) -> Section:
    from tools.benchmarks.conversions import bench_conversion_memory

    return section_of([bench_conversion_memory(run.folder)])


def _quality(run: Run) -> Section:
    from tools.benchmarks.quality import bench_quality

    assert run.model is not None and run.text is not None, "the command asked for both"
    return section_of([bench_quality(Path(run.model), run.text, run.folder)])


def _vision(_: Run) -> Section:
    from tools.benchmarks.vision_tower import bench_vision

    return section_of([bench_vision()])


def _recipes(run: Run) -> Section:
    from tools.benchmarks.recipes import bench_recipes

    assert run.model is not None and run.text is not None, "the command asked for both"
    return section_of([bench_recipes(Path(run.model), run.text, run.folder)])


def _mtp(run: Run) -> Section:
    from mlx_qwen.bench.mtp import bench_mtp
    from mlx_qwen.loading import load

    model, processor = load(run.model, revision=run.revision)
    return section_of(bench_mtp(model, processor, is_demo=run.model is None, tokens=run.generate_tokens))


def _kernels(_: Run) -> Section:
    from mlx_qwen.bench.launches import bench_launches
    from tools.benchmarks.kernel_bytes import bench_kernel_bytes

    return section_of([bench_launches(), bench_kernel_bytes()])


SECTIONS: dict[str, Callable[[Run], Section]] = {
    "speed": _speed,
    "rule": _rule,
    "model": _model,
    "host": _host,
    "start": _start,
    "convert": _convert,
    "convert-moe": _convert_moe,
    "convert-memory": _convert_memory,
    "quality": _quality,
    "recipes": _recipes,
    "vision": _vision,
    "mtp": _mtp,
    "kernels": _kernels,
}
