"""`mlx-qwen convert`: a checkpoint in, an MLX checkpoint out."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import click

from mlx_qwen.checkpoint.layout import Mode
from mlx_qwen.convert.description import Description
from mlx_qwen.convert.recipes import DEFAULT_RECIPE, RECIPES
from mlx_qwen.convert.settings import AUTO, AskedDType, DType, Quantizer


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
@click.option("--hf-path", "--model", required=True, help="Folder or Hub repository to convert.")
@click.option(
    "--mlx-path", type=click.Path(path_type=Path), default="mlx_model", show_default=True, help="Folder to write."
)
@click.option(
    "--quantize/--no-quantize",
    "-q",
    default=None,
    help="Pack most matrices, or none.  [default: pack, but not with --dtype alone]",
)
@click.option(
    "--recipe",
    metavar="NAME",
    help=f"Which matrix gets which precision: {', '.join(RECIPES)}.  [default: {DEFAULT_RECIPE}]",
)
@click.option(
    "--bits-for",
    multiple=True,
    callback=_by_pattern,
    metavar="PATTERN=BITS",
    help="Precision of matrices whose MLX name matches a regular expression: 'out_proj=8', 'mlp=4,32' (groups of 32), "
    "'embed=mxfp8', 'mtp=none' (unpacked), 'vision=8' (packed only so). Repeatable; the last that matches counts.",
)
@click.option(
    "--target-size", metavar="SIZE", help="Most that the weight files may take, such as 16GB; bits as measured."
)
@click.option(
    "--fit",
    metavar="MEMORY",
    help="Memory of the Mac to run on, such as 24GB; bits as measured, room left for --context.",
)
@click.option("--context", type=int, help="Tokens that --fit leaves room for.  [default: 32768, or the model's limit]")
@click.option("--q-bits", type=int, help="Bits of most matrices alike: 2, 3, 4, 5, 6 or 8.  [default: 4, mxfp8: 8]")
@click.option(
    "--q-group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 64, or the mode's]"
)
@click.option("--q-mode", type=click.Choice(get_args(Mode)), help="How numbers are packed.  [default: affine]")
@click.option(
    "--dtype",
    type=click.Choice((*get_args(DType), AUTO)),
    help="Type of unpacked weights; auto is what --chip is fast in.  [default: the source's]",
)
@click.option("--chip", help="Apple chip that --dtype auto is for, such as 'M2 Pro'.  [default: this machine's]")
@click.option(
    "--quantizer",
    type=click.Choice(get_args(Quantizer)),
    help="How codes are found: the nearest (rtn), by the least error of the weights (search), or by the least error of "
    "the outputs on a calibration text (gptq), which runs the model.  [default: search, gptq with --calibration]",
)
@click.option(
    "--calibration",
    metavar="FILE|default|none",
    help='Text for --quantizer gptq: a file, plain or .jsonl with a "text" or "messages" a line, or the one that '
    "comes with mlx-qwen.",
)
@click.option("-d", "--dequantize", is_flag=True, help="Unpack a quantized source, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder once the new one is complete.")
@click.option(
    "--no-resume",
    is_flag=True,
    help="Start afresh, where an interrupted conversion to the folder would be gone on with.",
)
@click.option(
    "--stream-from-hub",
    is_flag=True,
    help="Download, convert and remove one shard after the other: the disk needs room for the output and two shards.",
)
@click.option(
    "--verify",
    is_flag=True,
    help="Compare the output with the source, as `mlx-qwen compare` does, and say on its model card what that shows.",
)
@click.option(
    "--verify-text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Text file to --verify on.  [default: a short one of several languages and kinds]",
)
@click.option("--upload", metavar="REPO", help="Upload the output to this Hub repository; your login is checked first.")
@click.option("--revision", help="Branch, tag or commit of the Hub repository.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and show tensors and sizes, without writing; of a repository, headers are read.",
)
@click.option("--verbose", is_flag=True, help="Show every tensor, not only the kinds.")
def command(
    hf_path: str,
    mlx_path: Path,
    quantize: bool | None,
    recipe: str | None,
    bits_for: dict[str, str],
    target_size: str | None,
    fit: str | None,
    context: int | None,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: Mode | None,
    dtype: AskedDType | None,
    chip: str | None,
    quantizer: Quantizer | None,
    calibration: str | None,
    dequantize: bool,
    overwrite: bool,
    no_resume: bool,
    stream_from_hub: bool,
    verify: bool,
    verify_text: Path | None,
    upload: str | None,
    revision: str | None,
    dry_run: bool,
    verbose: bool,
) -> None:
    """Convert a checkpoint to MLX, quantized to 4 bits, and 8 where it matters, unless told otherwise.

    What is going to be written is shown first. Unlike mlx-lm's command, this one quantizes without -q. With
    --no-quantize, or with --dtype and no word of quantizing, only names, layout and dtype change.
    """
    if quantize and dequantize:
        raise click.UsageError("Choose one of --quantize and --dequantize.")
    ways = {"--recipe": recipe, "--target-size": target_size, "--fit": fit, "--q-bits": q_bits, "--q-mode": q_mode}
    _check_one(ways)
    if context is not None and fit is None:
        raise click.UsageError("--context only matters for --fit.")
    if verify_text is not None and not verify:
        raise click.UsageError("--verify-text only matters for --verify.")
    if quantize is None:
        given = (q_group_size, quantizer, calibration, *ways.values())
        asked = bool(bits_for) or any(value is not None for value in given)
        quantize = not dequantize and (dtype is None or asked)

    from mlx_qwen.convert import convert

    def announce(description: Description) -> None:
        click.echo(f"{description.table(tensors=verbose)}\n", err=not dry_run)

    try:
        report = convert(
            hf_path,
            mlx_path,
            recipe=recipe,
            bits_for=bits_for,
            target_size=target_size if fit is None else _room(hf_path, fit, context, revision),
            bits=q_bits,
            group_size=q_group_size,
            mode=q_mode,
            dtype=dtype,
            chip=chip,
            quantizer=quantizer,
            calibration=calibration,
            quantize=quantize,
            dequantize=dequantize,
            overwrite=overwrite,
            resume=not no_resume,
            stream_from_hub=stream_from_hub,
            verify=verify,
            verify_text=verify_text,
            upload=upload,
            revision=revision,
            dry_run=dry_run,
            announce=announce,
        )
    except KeyboardInterrupt:
        click.echo(
            f"\nInterrupted: the same command goes on from here. What is done lies in {mlx_path}.partial; remove that "
            "folder if you do not want to go on.",
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
