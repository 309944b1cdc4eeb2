"""`mlx-qwen compare`: how far one checkpoint is from another."""

import json
from pathlib import Path
from typing import Unpack

import click

from mlx_qwen.cli.flags import flags_of
from mlx_qwen.convert.comparison.options import ComparisonKeywords, ComparisonOptions


@click.command()
@click.argument("reference")
@click.argument("other")
@flags_of(
    ComparisonOptions,
    text={
        "type": click.Path(path_type=Path, exists=True, dir_okay=False),
        "help": "Text file to compare on. By default a short one of several languages and kinds.",
    },
)
@click.option("--json", "json_file", type=click.Path(path_type=Path, dir_okay=False), help="Write every number here.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw the errors by layer and tensor, as .png."
)
def command(
    reference: str,
    other: str,
    json_file: Path | None,
    plot: Path | None,
    **options: Unpack[ComparisonKeywords],
) -> None:
    """Measure how far the model OTHER is from the model REFERENCE, such as a conversion from its source.

    Both are folders or Hub repositories, in any format that `convert` reads. They run layer by layer, so that models
    larger than memory can be compared. Shows perplexities, divergence and agreement of predictions, and the errors of
    hidden states and weights.
    """
    from mlx_qwen.convert.comparison import check_destination, check_plot, compare, save_plot

    if plot is not None:
        check_plot(plot)
    for file in (json_file, plot):
        if file is not None:
            check_destination(file)
    comparison = compare(reference, other, **options)
    click.echo(comparison.table())
    if json_file is not None:
        json_file.write_text(json.dumps(comparison.as_json(), indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        save_plot(comparison, plot)
