"""`mlx-qwen plan`: what a model needs, whether it fits, and what bounds its speed."""

import click


@click.command()
@click.option("--model", required=True, help="Released size such as 35B-A3B, model folder, or Hub repository.")
@click.option("--recipe", help="Recipe of `convert`, or unpacked.  [default: mixed-4-8]")
@click.option("--bits", type=int, help="Instead, bits of all matrices alike: 2, 3, 4, 5, 6 or 8; 16 packs nothing.")
@click.option("--context", type=int, help="Tokens of prompt and answer.  [default: 32768, or the model's limit]")
@click.option("--memory", help="Memory of the machine, such as 64GB.  [default: this machine's]")
@click.option("--chip", help="Apple chip such as 'M4 Max', with --memory.  [default: this machine's, or all]")
@click.option("--tflops", type=float, help="fp16 arithmetic rate of the GPU, where Apple has published none.")
@click.option("--kv-bits", type=int, help="Pack keys and values to 8 or 4 bits.")
@click.option("--prefill-step-size", type=int, default=2048, show_default=True, help="Prompt tokens at once.")
@click.option("--vision", is_flag=True, help="Count the vision tower, which text alone does not load.")
@click.option("--revision", help="Branch, tag or commit of the Hub repository.")
def command(
    model: str,
    recipe: str | None,
    bits: int | None,
    context: int | None,
    memory: str | None,
    chip: str | None,
    tflops: float | None,
    kv_bits: int | None,
    prefill_step_size: int,
    vision: bool,
    revision: str | None,
) -> None:
    """Work out what a model needs, whether it fits, and what bounds its speed.

    Nothing is loaded and no weights are downloaded. Weights are counted as `convert` would write them. Speeds are upper
    bounds from bandwidth and arithmetic, never measurements.
    """
    from mlx_qwen.convert.planning import plan

    result = plan(
        model,
        bits=bits,
        recipe=recipe,
        context=context,
        memory=memory,
        chip=chip,
        tflops=tflops,
        kv_bits=kv_bits,
        prefill_step_size=prefill_step_size,
        vision=vision,
        revision=revision,
    )
    click.echo(result.table())
