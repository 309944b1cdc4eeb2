"""`mlx-qwen pull`: a conversion for MLX by the name of its size, or any repository, into the Hub's cache."""

import click

from mlx_qwen.checkpoint.known import CONVERSIONS, original, size_named


@click.command()
@click.argument("name", metavar="SIZE|REPO")
@click.option("--original", "unquantized", is_flag=True, help="Of a size, Qwen's own repository in bf16.")
@click.option("--revision", help="Branch, tag or commit of the Hub repository.")
def command(name: str, unquantized: bool, revision: str | None) -> None:
    """Download a model into the Hub's cache: of a size such as 9B a conversion to 4 bits, or a repository.

    Conversions are those of mlx-community, by a table of names: nothing is searched.
    """
    from mlx_qwen.checkpoint.hub import resolve

    size = size_named(name)
    if size is None and "/" not in name:
        sizes = ", ".join(CONVERSIONS)
        raise click.UsageError(f"{name!r} is no repository such as Qwen/Qwen3.5-9B and no size: {sizes}.")
    repository = name if size is None else original(size) if unquantized else CONVERSIONS[size]
    click.echo(f"Downloading {repository}", err=True)
    folder = resolve(repository, revision=revision)
    click.echo(f"{repository} lies in {folder}\nmlx-qwen chat --model {repository}")
