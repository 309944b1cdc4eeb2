"""`mlx-qwen convert`: a checkpoint in, an MLX checkpoint out."""

from pathlib import Path
from typing import get_args

import click

from mlx_qwen.checkpoint import Mode
from mlx_qwen.convert.settings import DType


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
@click.option("--q-bits", type=int, help="Bits per weight: 2, 3, 4, 5, 6 or 8.  [default: 4, mxfp8: 8]")
@click.option(
    "--q-group-size", type=int, help="Weights that share a scale: 32, 64 or 128.  [default: 64, or the mode's]"
)
@click.option("--q-mode", type=click.Choice(get_args(Mode)), help="How numbers are packed.  [default: affine]")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="Type of unpacked weights.  [default: the source's]")
@click.option("-d", "--dequantize", is_flag=True, help="Unpack a quantized source, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace an existing model folder once the new one is complete.")
@click.option("--revision", help="Branch, tag or commit of the Hub repository.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything and show the sizes, without writing; repositories are downloaded.",
)
def command(
    hf_path: str,
    mlx_path: Path,
    quantize: bool | None,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: Mode | None,
    dtype: DType | None,
    dequantize: bool,
    overwrite: bool,
    revision: str | None,
    dry_run: bool,
) -> None:
    """Convert a checkpoint to MLX, quantized to 4 bits unless told otherwise.

    Unlike mlx-lm's command, this one quantizes without -q. With --no-quantize, or with --dtype and no word of
    quantizing, only names, layout and dtype change.
    """
    if quantize and dequantize:
        raise click.UsageError("Choose one of --quantize and --dequantize.")
    if quantize is None:
        asked = q_bits is not None or q_group_size is not None or q_mode is not None
        quantize = not dequantize and (dtype is None or asked)

    from mlx_qwen.convert import convert

    try:
        report = convert(
            hf_path,
            mlx_path,
            bits=q_bits,
            group_size=q_group_size,
            mode=q_mode or "affine",
            dtype=dtype,
            quantize=quantize,
            dequantize=dequantize,
            overwrite=overwrite,
            revision=revision,
            dry_run=dry_run,
        )
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted: nothing was left at {mlx_path}.", err=True)
        raise
    click.echo(report.table())
