"""`mlx-qwen bench`: speed on this machine, beside mlx-lm and mlx-vlm in the same run."""

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlx_qwen.bench.section import Section

# What installs each peer.
PEERS = {"mlx-lm": "pip install mlx-lm", "mlx-vlm": "pip install 'mlx-qwen[bench]'"}


class _Sizes(click.ParamType[tuple[int, ...]]):
    """Numbers of tokens with commas between them."""

    name = "n,n,…"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(int(size) for size in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 128,512.", param, ctx)
        if min(sizes) < 1:
            self.fail(f"{min(sizes)} is no size of a prompt, expected at least 1 token.", param, ctx)
        return tuple(sorted(set(sizes)))


@click.command()
@click.option("--model", metavar="PATH|REPO", help="What to measure.  [default: the bundled demo]")
@click.option("--revision", help="Branch, tag or commit of the repository.")
@click.option("--prompt-tokens", type=_Sizes(), default="128,512,2048", show_default=True, help="Sizes of the prompts.")
@click.option("--generate-tokens", type=click.IntRange(2), default=64, show_default=True, help="Tokens after each.")
@click.option("--kernels-on-off", is_flag=True, help="Measure with the Metal kernels and with plain MLX instead.")
@click.option("--vs", type=click.Choice(list(PEERS)), multiple=True, help="Measure this too; may be repeated.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed turns of each candidate.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every sample here.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write what is printed here too.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw speed into this .png.")
@click.option("--kernels", is_flag=True, help="Count the GPU launches of a decoded token instead, without running it.")
@click.option("--mtp", is_flag=True, help="Show instead what the MTP layer reads, and how often its drafts are right.")
@click.option(
    "--workdir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints are made and removed again.  [default: the system's temporary folder]",
)
def command(
    model: str | None,
    revision: str | None,
    prompt_tokens: tuple[int, ...],
    generate_tokens: int,
    kernels_on_off: bool,
    vs: tuple[str, ...],
    repeats: int,
    json_file: Path | None,
    markdown: Path | None,
    plot: Path | None,
    kernels: bool,
    mtp: bool,
    workdir: Path | None,
) -> None:
    """Measure prefill, decode and memory of a model, beside mlx-lm and mlx-vlm in alternation.

    Paste the output into a bug report: it names the chip and every version. The whole picture of one model:

    mlx-qwen bench --model FOLDER --kernels-on-off --vs mlx-lm --vs mlx-vlm --json bench.json --plot bench.png
    """
    _check(vs, plot, kernels, mtp)
    from mlx_qwen.bench.section import print_sections
    from mlx_qwen.bench.speed_section import SpeedRun, speed_section
    from mlx_qwen.bench.subject import subject

    def speed() -> "Section":
        run = SpeedRun(prompt_tokens, generate_tokens, kernels_on_off, vs, repeats, plot)
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            most = max(prompt_tokens) + generate_tokens
            measured = subject(model, revision, most, lambda source: _in_fp32(source, Path(folder)))
            return speed_section(measured, run, lambda line: click.echo(line, err=True))

    def drafts() -> "Section":
        from mlx_qwen.bench.mtp import bench_mtp
        from mlx_qwen.bench.section import section_of
        from mlx_qwen.loading import load

        loaded = load(model, revision=revision)
        return section_of(bench_mtp(*loaded, is_demo=model is None, tokens=generate_tokens))

    asked = {"kernels": _launches} if kernels else {}
    asked |= {"mtp": drafts} if mtp else {}
    print_sections((asked or {"speed": speed}).items(), click.echo, json_file=json_file, markdown=markdown)


def _check(vs: tuple[str, ...], plot: Path | None, kernels: bool, mtp: bool) -> None:
    missing = [peer for peer in vs if find_spec(peer.replace("-", "_")) is None]
    if missing:
        raise click.UsageError(f"--vs {missing[0]} needs it: {PEERS[missing[0]]}")
    if plot is not None:
        if kernels or mtp:
            raise click.UsageError(
                "--plot draws speed, which --kernels and --mtp do not measure: leave one of them out."
            )
        from mlx_qwen.bench.chart import check_plot

        check_plot(plot)


def _in_fp32(source: Path, workdir: Path) -> Path:
    from mlx_qwen.convert import convert

    whole = workdir / "fp32"
    convert(source, whole, quantize=False, dtype="float32", progress=False)
    return whole


def _launches() -> "Section":
    from mlx_qwen.bench.launches import launches_table
    from mlx_qwen.bench.section import section_of
    from mlx_qwen.checkpoint.layout import Quantization
    from mlx_qwen.convert.recipes import uniform

    return section_of([launches_table(uniform(Quantization(bits=4, group_size=64)).precision)])
