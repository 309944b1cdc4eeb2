"""`mlx-qwen convert`: a checkpoint in, an MLX checkpoint out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import click

from mlx_qwen.cli.flags import flags_of
from mlx_qwen.convert.description import Description
from mlx_qwen.convert.options import ConversionKeywords, ConversionOptions


def _by_pattern(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`pattern=bits` given any number of times, as patterns and precisions."""
    bits_for: dict[str, str] = {}
    for value in values:
        pattern, _, precision = value.rpartition("=")
        if not pattern:
            raise click.BadParameter(f"{value!r} is no pattern=bits, such as 'out_proj=8' or 'mlp=4,32'.", ctx, param)
        bits_for.pop(pattern, None)  # so that one given again counts as the last
        bits_for[pattern] = precision
    return bits_for


@click.command()
@click.option("--hf-path", "--model", required=True, help="Folder, Hub repository or size such as 9B to convert.")
@click.option(
    "--mlx-path", type=click.Path(path_type=Path), default="mlx_model", show_default=True, help="Folder to write."
)
@click.option(
    "--fit",
    metavar="MEMORY",
    help="The Mac to run on by its memory, as it is sold: 24GB is one with 24 GiB. Bits as measured, room left for "
    "--context.",
)
@click.option("--context", type=int, help="Tokens that --fit leaves room for.  [default: 32768, or the model's limit]")
@flags_of(
    ConversionOptions,
    quantize={"default": None, "help": "Pack most matrices, or none.  [default: pack, but not with --dtype alone]"},
    bits_for={"multiple": True, "type": str, "callback": _by_pattern},
    verify_text={"type": click.Path(path_type=Path, exists=True, dir_okay=False)},
)
@click.option("--verbose", is_flag=True, help="Show every tensor, not only the kinds.")
def command(
    hf_path: str,
    mlx_path: Path,
    fit: str | None,
    context: int | None,
    verbose: bool,
    **options: Unpack[ConversionKeywords],
) -> None:
    """Convert a checkpoint to MLX, quantized to 4.6 bits a weight unless told otherwise.

    What is going to be written is shown first. Unlike mlx-lm's command, this one quantizes without -q. With
    --no-quantize, or with --dtype and no word of quantizing, only names, layout and dtype change.
    """
    if options["quantize"] and options["dequantize"]:
        raise click.UsageError("Choose one of --quantize and --dequantize.")
    ways = {
        "--recipe": options["recipe"],
        "--target-size": options["target_size"],
        "--fit": fit,
        "--q-bits": options["bits"],
        "--q-mode": options["mode"],
    }
    _check_one(ways)
    if context is not None and fit is None:
        raise click.UsageError("--context only matters for --fit.")
    if options["verify_text"] is not None and not options["verify"]:
        raise click.UsageError("--verify-text only matters for --verify.")
    if options["quantize"] is None:
        given = (options["group_size"], options["quantizer"], options["calibration"], *ways.values())
        asked = bool(options["bits_for"]) or any(value is not None for value in given)
        options["quantize"] = not options["dequantize"] and (options["dtype"] is None or asked)
    if fit is not None:
        options["target_size"] = _room(hf_path, fit, context, options["revision"])

    from mlx_qwen.convert import convert
    from mlx_qwen.convert.writing.staging import real_target, work_folder

    def announce(description: Description) -> None:
        click.echo(f"{description.table(tensors=verbose)}\n", err=not options["dry_run"])

    options["announce"] = announce
    try:
        report = convert(hf_path, mlx_path, **options)
    except KeyboardInterrupt:
        work = work_folder(real_target(mlx_path.expanduser()))
        click.echo(
            f"\nInterrupted: the same command goes on from here. What is done lies in {work}; remove that folder if "
            "you do not want to go on."
            if work.is_dir() and not options["dry_run"]
            else "\nInterrupted before anything was written.",
            err=True,
        )
        raise
    click.echo(report.table())
    if report.quality is not None:
        click.echo(f"\n{report.quality.table()}")


def _check_one(ways: Mapping[str, object]) -> None:
    """Raise UsageError when several options that decide about every matrix are given."""
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1 and given != ["--q-bits", "--q-mode"]:
        raise click.UsageError(
            f"{' and '.join(given)} each decide about every matrix. Choose one, and say with --bits-for what differs."
        )


def _room(hf_path: str, fit: str, context: int | None, revision: str | None) -> int:
    """Bytes that the weights may take so that the model runs with this context in this memory."""
    from mlx_qwen.convert.planning import room_for_weights

    return room_for_weights(hf_path, memory=fit, context=context, revision=revision)
