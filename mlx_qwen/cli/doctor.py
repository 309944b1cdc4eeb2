"""`mlx-qwen doctor`: what this machine is, and whether every kernel computes here what its reference does."""

import os
import platform
import subprocess
import sys

import click

from mlx_qwen.cli.doctor_ranks import show_ranks
from mlx_qwen.command_buffers import facts as buffer_facts
from mlx_qwen.command_buffers import users_own
from mlx_qwen.version import installed

_FAILED = 1
_NAME = 54


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed runs of each kernel.")
@click.option("--tune", is_flag=True, help="Try the kernels anew at a model's own sizes, and remember what suits.")
@click.option("--model", metavar="PATH|REPO", help="Whose sizes --tune tries.  [default: the bundled demo]")
@click.option("--distributed", is_flag=True, help="Instead, measure the connection between the Macs of mlx.launch.")
def command(repeats: int, tune: bool, model: str | None, distributed: bool) -> None:
    """Check this machine and run each kernel's parity probe on its GPU.

    Paste the output into a bug report. Without a GPU the kernels are not run: MLX's CPU backend has no Metal, and the
    plain MLX references are used. Exits with 1 when a kernel disagrees with its reference or cannot be built.
    """
    if distributed:
        show_ranks()
        return
    # Where MLX multiplies fp32 matrices at lower precision, the references would differ from the kernels by that.
    os.environ.setdefault("MLX_ENABLE_TF32", "0")
    import mlx.core as mx

    from metal_kernels import backend
    from metal_kernels._backend import ENVIRONMENT_VARIABLE

    for name, value in _machine():
        click.echo(f"{name:<22}{value}")
    click.echo(f"{ENVIRONMENT_VARIABLE:<22}{backend().value} is used\n")
    if not mx.metal.is_available():
        click.echo("No Metal GPU: the kernels were not run, and the references do their work.")
        return
    if not _probed(repeats):
        click.echo(f"Set {ENVIRONMENT_VARIABLE}=reference until this is fixed, and report it with this output.")
        sys.exit(_FAILED)
    if tune:
        _tuned(model)


def _tuned(path: str | None) -> None:
    """Print what was measured at a model's sizes, and how its kernels run from now on."""
    from mlx_qwen.bench.command_buffers import buffer_table, tune_command_buffers
    from mlx_qwen.checkpoint.hub import resolve
    from mlx_qwen.demo import demo_folder
    from mlx_qwen.loading import load
    from mlx_qwen.model.proving import machine, prove, table

    model, _ = load(path, tune=False)
    tuned = prove(model)
    click.echo(f"\nAt the sizes of {path or 'the bundled demo'} on {machine()}:\n{table(tuned.rows)}\n")
    if own := users_own():
        click.echo(f"Command buffers were not tried: {' and '.join(own)} set by you hold.")
    elif tried := tune_command_buffers(demo_folder() if path is None else resolve(path)):
        click.echo(buffer_table(tried))


def _machine() -> list[tuple[str, str]]:
    import mlx.core as mx

    packages = ("mlx-qwen", "mlx", "mlx-lm")
    facts = [
        ("system", f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform()),
        ("python", platform.python_version()),
        *((name, installed(name) or "not installed") for name in packages),
        ("default device", str(mx.default_device())),
    ]
    gigabytes = {
        "memory_size": "memory",
        "max_recommended_working_set_size": "recommended for MLX",
        "max_buffer_length": "largest buffer",
    }
    for key, value in mx.device_info().items():
        if key in gigabytes:
            facts.append((gigabytes[key], f"{int(value) / 1e9:.1f} GB"))
        elif key in ("device_name", "architecture"):
            facts.append((key.replace("_", " "), str(value)))
    if sys.platform == "darwin":
        limit = subprocess.run(["sysctl", "-n", "iogpu.wired_limit_mb"], capture_output=True, text=True, check=False)
        megabytes = limit.stdout.strip() or "unknown"
        facts.append(("wired limit", "the system's own" if megabytes == "0" else f"{megabytes} MB"))
    return facts + buffer_facts()


def _probed(repeats: int) -> bool:
    """Print a line for each kernel; whether all of them passed."""
    from metal_kernels.parity import run_probe
    from metal_kernels.parity_cases import probes

    results = [run_probe(probe, repeats=repeats) for probe in probes()]
    click.echo(f"{'kernel':<{_NAME}}{'result':<10}{'difference':<14}{'kernel':<12}reference")
    for result in results:
        if result.error is None or result.kernel_ms is None or result.reference_ms is None:
            click.echo(f"{result.kernel:<{_NAME}}{'failed':<10}{result.failure}")
            continue
        verdict = "equal" if result.passed else "differs"
        times = f"{result.kernel_ms:.2f} ms".ljust(12) + f"{result.reference_ms:.2f} ms"
        click.echo(f"{result.kernel:<{_NAME}}{verdict:<10}{result.error:<14.1e}{times}")
    return all(result.passed for result in results)
