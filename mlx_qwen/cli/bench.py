"""`mlx-qwen bench`: speed and memory on this machine, beside mlx-lm in the same run."""

import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click

SECTIONS = ("rule", "model", "host", "start", "convert", "convert-moe", "quality", "kernels")
_DEFAULT = ("rule", "model", "host", "start", "convert")


@click.command()
@click.option(
    "--only",
    type=click.Choice(SECTIONS),
    multiple=True,
    help="What to measure, several times for several: the gated delta rule's prefill, a whole small model, the host's "
    "share of a token, import and load, converting a 0.8B (1.7 GB), converting 4 layers of 35B-A3B (7 GB), what "
    f"precision costs a model on a text, kernel launches and bytes.  [default: {', '.join(_DEFAULT)}]",
)
@click.option("--kernels", is_flag=True, help="The same as --only kernels.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed turns of each candidate.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="Unquantized model folder, for quality.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text file, for quality.")
@click.option(
    "--workdir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints are made and removed again.  [default: the system's temporary folder]",
)
def command(
    only: tuple[str, ...], kernels: bool, repeats: int, model: Path | None, text: Path | None, workdir: Path | None
) -> None:
    """Measure speed, memory and precision beside mlx-lm, in alternation."""
    chosen = (*only, "kernels") if kernels else only or _DEFAULT
    if "quality" in chosen and (model is None or text is None):
        raise click.UsageError("--only quality needs --model, an unquantized model folder, and --text, a text file.")
    click.echo(_machine())
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        run = Run(repeats, Path(folder), model, text)
        for section in dict.fromkeys(chosen):
            click.echo(_SECTIONS[section](run))


@dataclass(frozen=True, slots=True)
class Run:
    """What the command line asked for: timed turns, a folder for checkpoints, and what `quality` compares on."""

    repeats: int
    folder: Path
    model: Path | None
    text: Path | None


def _machine() -> str:
    import mlx.core as mx

    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx-qwen", "mlx", "mlx-lm"))
    return f"{packages}; Python {platform.python_version()}; {platform.platform()}; {mx.default_device()}\n"


def _rule(run: Run) -> object:
    from mlx_qwen.bench.gated_delta import bench_rule

    return bench_rule(repeats=run.repeats)


def _model(run: Run) -> object:
    from mlx_qwen.bench.model import bench_model

    return bench_model(repeats=run.repeats)


def _host(run: Run) -> object:
    from mlx_qwen.bench.model import bench_host_time

    return bench_host_time(repeats=3 * run.repeats)


def _start(run: Run) -> object:
    from mlx_qwen.bench.startup import bench_startup

    return bench_startup(run.folder, repeats=run.repeats)


def _convert(run: Run) -> object:
    from mlx_qwen.bench.convert import bench_conversion

    return bench_conversion("0.8B", run.folder, repeats=run.repeats)


def _convert_moe(run: Run) -> object:
    from mlx_qwen.bench.convert import bench_conversion

    return bench_conversion("35B-slice", run.folder, repeats=run.repeats)


def _quality(run: Run) -> object:
    from mlx_qwen.bench.quality import bench_quality

    assert run.model is not None and run.text is not None, "the command asked for both"
    return bench_quality(run.model, run.text, run.folder)


def _kernels(_: Run) -> object:
    from mlx_qwen.bench.kernel_bytes import bench_kernel_bytes
    from mlx_qwen.bench.launches import bench_launches

    return f"{bench_launches()}\n{bench_kernel_bytes()}"


_SECTIONS: dict[str, Callable[[Run], object]] = {
    "rule": _rule,
    "model": _model,
    "host": _host,
    "start": _start,
    "convert": _convert,
    "convert-moe": _convert_moe,
    "quality": _quality,
    "kernels": _kernels,
}
