"""`mlx-qwen bench`: speed and memory on this machine, beside mlx-lm and mlx-vlm in the same run."""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from mlx_qwen.bench.sections import SECTIONS, Run

PEERS = ("mlx-lm", "mlx-vlm")


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
@click.option("--vs", type=click.Choice(PEERS), multiple=True, help="Measure this too; may be repeated.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed turns of each candidate.")
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every sample here.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write what is printed here too.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw speed into this .png.")
@click.option(
    "--only",
    type=click.Choice(list(SECTIONS)),
    multiple=True,
    help="What to measure, several times for several: a model's prefill and decode (speed), the gated delta rule's "
    "prefill, a whole small model, the host's share of a token, import and load, converting a 0.8B (1.7 GB), "
    "converting 4 layers of 35B-A3B (7 GB), how a conversion's memory grows "
    "(convert-memory), what precision costs a model on a text, the same of "
    "every recipe (recipes), the vision tower's memory, what the MTP layer reads and how far it drafts, kernel "
    "launches and bytes.  "
    "[default: speed]",
)
@click.option("--kernels", is_flag=True, help="The same as --only kernels.")
@click.option("--mtp", is_flag=True, help="The same as --only mtp.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Text file, for --only quality or recipes.")
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
    only: tuple[str, ...],
    kernels: bool,
    mtp: bool,
    text: Path | None,
    workdir: Path | None,
) -> None:
    """Measure speed, memory and precision, beside mlx-lm and mlx-vlm in alternation.

    Paste the output into a bug report: it names the chip and every version. The whole picture of one model:

    mlx-qwen bench --model FOLDER --kernels-on-off --vs mlx-lm --vs mlx-vlm --json bench.json --plot bench.png
    """
    flagged = [name for name, given in (("kernels", kernels), ("mtp", mtp)) if given]
    chosen = tuple(dict.fromkeys((*only, *flagged))) or ("speed",)
    _check(chosen, model, text, vs, plot)
    from mlx_qwen.bench.machine import machine_facts, machine_line

    facts = machine_facts()
    lines = [machine_line(facts), ""]
    click.echo("\n".join(lines))
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        run = Run(
            repeats=repeats,
            folder=Path(folder),
            model=model,
            revision=revision,
            text=text,
            prompt_tokens=prompt_tokens,
            generate_tokens=generate_tokens,
            kernels_on_off=kernels_on_off,
            vs=vs,
            plot=plot,
            say=lambda line: click.echo(line, err=True),
        )
        for name in chosen:
            section = SECTIONS[name](run)
            results[name] = section.data
            lines.append(section.text)
            click.echo(section.text)
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": facts, **results}, indent=2) + "\n", encoding="utf-8")


def _check(
    chosen: tuple[str, ...], model: str | None, text: Path | None, vs: tuple[str, ...], plot: Path | None
) -> None:
    judged = [name for name in chosen if name in ("quality", "recipes")]
    if judged and (model is None or text is None or not Path(model).is_dir()):
        raise click.UsageError(
            f"--only {judged[0]} needs --model, an unquantized model folder, and --text, a text file."
        )
    missing = [peer for peer in vs if find_spec(peer.replace("-", "_")) is None]
    if missing:
        raise click.UsageError(f"--vs {missing[0]} needs it: pip install {missing[0]}")
    if plot is not None:
        if "speed" not in chosen:
            raise click.UsageError("--plot draws the section speed: add --only speed.")
        from mlx_qwen.bench.chart import check_plot

        check_plot(plot)
