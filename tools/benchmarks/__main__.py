"""What developers measure: `python -m tools.benchmarks [SECTION …]`, in a checkout of the sources."""

import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from mlx_qwen.bench.section import Section, print_sections, section_of
from mlx_qwen.errors import MLXQwenError


@dataclass(frozen=True, slots=True)
class Run:
    """What the command line asked for.

    Attributes:
        repeats: timed turns of each candidate.
        folder: for checkpoints, which are removed with it.
        model, text: a model folder and a text file, for the sections that judge a model.
        kinds: another model and a text of its own, whose weights of kinds are taken.
        tokens: how long the prompt of `long` or `packed` is, if not as long as usual.
        minutes: how long `soak` and `load` go on.
        vlm: the Python of an environment with mlx-vlm, for `serve`.
        ranks: of `round-trip`.
        kind: models that `ranks` divides, if not all.
    """

    repeats: int
    folder: Path
    model: Path | None
    text: Path | None
    kinds: tuple[Path, Path] | None
    tokens: int | None
    minutes: float
    requests: int
    vlm: Path | None
    ranks: int
    kind: tuple[str, ...]

    def judged(self) -> tuple[Path, Path]:
        """The model folder and the text file."""
        assert self.model is not None and self.text is not None, "the command asked for both"
        return self.model, self.text


def _rule(run: Run) -> Section:
    from tools.benchmarks.delta_rule import bench_rule

    return section_of([bench_rule(repeats=run.repeats)])


def _model(run: Run) -> Section:
    from tools.benchmarks.small_model import bench_model

    return section_of([bench_model(repeats=run.repeats)])


def _host(run: Run) -> Section:
    from tools.benchmarks.engine_host import bench_engine_host
    from tools.benchmarks.small_model import bench_host_time

    tables = [bench_host_time(repeats=3 * run.repeats), bench_engine_host(repeats=3 * run.repeats)]
    return section_of(tables)


def _drafts(run: Run) -> Section:
    from tools.benchmarks.draft_equality import bench_equality
    from tools.benchmarks.drafts import bench_drafts

    return section_of([bench_drafts(prompts=run.repeats), bench_equality()])


def _vocabulary(run: Run) -> Section:
    from tools.benchmarks.draft_vocabulary import bench_draft_vocabulary

    return section_of([bench_draft_vocabulary(repeats=run.repeats)])


def _grammar(run: Run) -> Section:
    from tools.benchmarks.grammar_cost import bench_grammar

    return section_of([bench_grammar(repeats=run.repeats)])


def _session(_: Run) -> Section:
    from tools.benchmarks.session import bench_session

    return section_of([bench_session()])


def _throughput(run: Run) -> Section:
    from tools.benchmarks.throughput import bench_throughput

    return section_of([bench_throughput(repeats=run.repeats)])


def _long(run: Run) -> Section:
    from tools.benchmarks.long_prompt import bench_long

    return section_of([bench_long(tokens=run.tokens or 100_000)])


def _packed(run: Run) -> Section:
    from tools.benchmarks.packed_keys import bench_packed

    tokens = run.tokens or 32_768
    return section_of([bench_packed(tokens=tokens, scores=scores) for scores in (False, True)])


def _restore(run: Run) -> Section:
    from tools.benchmarks.restoring import bench_restoring

    return section_of([bench_restoring(run.folder, repeats=run.repeats)])


def _soak(run: Run) -> Section:
    from tools.benchmarks.soak import bench_soak

    return section_of([bench_soak(run.minutes)])


def _serve(run: Run) -> Section:
    from tools.benchmarks.serving import bench_serving

    return section_of([bench_serving(run.folder, repeats=run.repeats, vlm=run.vlm)])


def _load(run: Run) -> Section:
    from tools.benchmarks.load import bench_load

    return section_of([bench_load(run.minutes)])


def _requests(run: Run) -> Section:
    from tools.benchmarks.random_requests import bench_requests

    return section_of([bench_requests(run.requests)])


def _ranks(run: Run) -> Section:
    from tools.benchmarks.ranks import bench_ranks

    return section_of(bench_ranks(run.folder, kinds=run.kind, turns=run.repeats))


def _round_trip(run: Run) -> Section:
    from tools.benchmarks.round_trip import bench_round_trip

    return section_of([bench_round_trip(run.folder, ranks=run.ranks, turns=run.repeats)])


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

    return section_of([bench_quality(*run.judged(), run.folder)])


def _kinds(run: Run) -> Section:
    from tools.benchmarks.kinds import bench_kinds

    return section_of([bench_kinds(*run.judged(), run.folder)])


def _recipes(run: Run) -> Section:
    from tools.benchmarks.recipes import bench_recipes

    if run.kinds is not None:
        from tools.benchmarks.kinds import kind_weights, use_weights

        use_weights(kind_weights(*run.kinds, run.folder))
    return section_of([bench_recipes(*run.judged(), run.folder)])


def _vision(_: Run) -> Section:
    from tools.benchmarks.vision_tower import bench_vision

    return section_of([bench_vision()])


def _kernels(_: Run) -> Section:
    from tools.benchmarks.kernel_bytes import bench_kernel_bytes
    from tools.benchmarks.launches import bench_launches

    return section_of([bench_launches(), bench_kernel_bytes()])


# What each section measures, and how.
SECTIONS: dict[str, tuple[str, Callable[[Run], Section]]] = {
    "rule": ("the gated delta rule's prefill", _rule),
    "model": ("prefill and decode of a small model", _model),
    "host": ("the host's share of a decoded token", _host),
    "drafts": ("drafts of the bundled model, and answers with drafts beside those without", _drafts),
    "vocabulary": ("guesses from parts of the real vocabulary, beside all of it", _vocabulary),
    "grammar": ("what holding an answer to a grammar costs a token", _grammar),
    "throughput": ("answers that are written at the same time", _throughput),
    "long": ("a prompt of --tokens tokens beside what is planned", _long),
    "packed": ("a prompt of --tokens tokens with packed keys and values: memory beside mlx-lm's", _packed),
    "restore": ("going back to a prefix of 16k tokens, in memory and from a folder", _restore),
    "soak": ("--minutes of random requests: answers, memory, files and threads", _soak),
    "serve": ("throughput and first tokens of servers, beside mlx-lm's and mlx-vlm's", _serve),
    "load": ("--minutes of 32 clients at a server: answers, memory, files and threads", _load),
    "requests": ("--requests random requests, each beside its solo run", _requests),
    "session": ("what an agent's session computes beside the least possible", _session),
    "ranks": ("a model divided among ranks, beside mlx-lm's division", _ranks),
    "round-trip": ("a token of ranks at delays of the network between them, beside what is planned", _round_trip),
    "start": ("import and load of a 0.8B", _start),
    "convert": ("converting a 0.8B, 1.7 GB", _convert),
    "convert-moe": ("converting 4 layers of 35B-A3B, 7 GB", _convert_moe),
    "convert-memory": ("how a conversion's memory grows", _convert_memory),
    "vision": ("the vision tower's memory", _vision),
    "kernels": ("launches of a decoded token, and the kernels' device bytes", _kernels),
    "quality": ("what precision costs --model on --text", _quality),
    "kinds": ("what an error in each kind of matrix costs --model on --text", _kinds),
    "recipes": ("what every recipe costs --model on --text", _recipes),
}
RANKED = ("dense", "moe", "next", "bundled")
JUDGES = ("quality", "kinds", "recipes")
DEFAULT = ("rule", "model", "host", "start", "convert", "kernels")


class _Listed(click.Command):
    """A command whose help lists the sections."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Sections"):
            formatter.write_dl([(name, what) for name, (what, _) in SECTIONS.items()])


@click.command(cls=_Listed)
@click.argument("sections", metavar="[SECTION …]", type=click.Choice(list(SECTIONS)), nargs=-1)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed turns of each candidate.")
@click.option(
    "--model", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Unquantized model folder."
)
@click.option("--text", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Text to judge it on.")
@click.option(
    "--kinds",
    type=(click.Path(path_type=Path, exists=True, file_okay=False), click.Path(path_type=Path, exists=True)),
    metavar="MODEL TEXT",
    help="For `recipes`, take the weights of kinds that another model shows on a text.",
)
@click.option("--tokens", type=click.IntRange(1000), help="Prompt of `long`, `packed`.  [default: 100000, 32768]")
@click.option("--minutes", type=click.FloatRange(0.1), default=5, show_default=True, help="Time of `soak` and `load`.")
@click.option("--requests", type=click.IntRange(1), default=1000, show_default=True, help="How many `requests` asks.")
@click.option(
    "--vlm",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="PYTHON",
    help="The Python of an environment of its own that has mlx-vlm, for `serve`.",
)
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="Ranks of `round-trip`.")
@click.option(
    "--kind",
    type=click.Choice(RANKED),
    multiple=True,
    help="Model that `ranks` divides; may be repeated.  [default: all]",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write the tables here.")
@click.option("--markdown", type=click.Path(path_type=Path, dir_okay=False), help="Write what is printed here too.")
@click.option(
    "--workdir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where checkpoints are made and removed again.  [default: the system's temporary folder]",
)
def main(
    sections: tuple[str, ...],
    repeats: int,
    model: Path | None,
    text: Path | None,
    kinds: tuple[Path, Path] | None,
    tokens: int | None,
    minutes: float,
    requests: int,
    vlm: Path | None,
    ranks: int,
    kind: tuple[str, ...],
    json_file: Path | None,
    markdown: Path | None,
    workdir: Path | None,
) -> None:
    """Measure parts of this project beside mlx-lm's and mlx-vlm's, in alternation."""
    # Sections that are ended from outside end what they have started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = tuple(dict.fromkeys(sections or DEFAULT))
    judges = [name for name in chosen if name in JUDGES]
    if judges and (model is None or text is None):
        raise click.UsageError(f"{judges[0]} needs --model, an unquantized model folder, and --text, a text file.")
    try:
        with tempfile.TemporaryDirectory(dir=workdir) as folder:
            run = Run(repeats, Path(folder), model, text, kinds, tokens, minutes, requests, vlm, ranks, kind)
            measured = [(name, partial(SECTIONS[name][1], run)) for name in chosen]
            print_sections(measured, click.echo, json_file=json_file, markdown=markdown)
    except MLXQwenError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main(prog_name="python -m tools.benchmarks")
