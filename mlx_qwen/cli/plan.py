"""`mlx-qwen plan`: what a model needs, whether it fits, and what bounds its speed."""

from typing import Unpack

import click

from mlx_qwen.cli.flags import flags_of
from mlx_qwen.convert.planning.options import PlanKeywords, PlanOptions


@click.command()
@click.option("--model", required=True, help="Released size such as 35B-A3B, model folder, or Hub repository.")
@flags_of(PlanOptions)
def command(model: str, **options: Unpack[PlanKeywords]) -> None:
    """Work out what a model needs, whether it fits, and what bounds its speed.

    Nothing is loaded and no weights are downloaded. Weights are counted as `convert` would write them. Speeds are upper
    bounds from bandwidth and arithmetic, never measurements.
    """
    from mlx_qwen.convert.planning import plan

    click.echo(plan(model, **options).table())
