"""`mlx-qwen models`: what lies in the Hub's cache, and removing it."""

import click


@click.command()
@click.option("--delete", metavar="REPO", help="Remove this repository from the cache, all revisions of it.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def command(delete: str | None, yes: bool) -> None:
    """List the models in the Hub's cache: size, precision, and which runtimes load them."""
    from mlx_qwen.checkpoint.cached import cached_models, delete_cached

    found = cached_models()
    if delete is not None:
        size = next((f" ({model.nbytes / 1e9:.2f} GB)" for model in found if model.repository == delete), "")
        if not yes and size:
            click.confirm(f"Remove {delete}{size} from the cache?", abort=True, err=True)
        click.echo(f"Removed {delete}: {delete_cached(delete) / 1e9:.2f} GB freed.")
        return
    if not found:
        click.echo("The Hub's cache holds no models. `mlx-qwen pull 0.8B` fetches one.")
        return
    width = max(len(model.repository) for model in found)
    for model in found:
        read = f"read by {', '.join(model.readers)}" if model.readers else model.note
        click.echo(f"{model.repository:<{width}}  {model.nbytes / 1e9:>8.2f} GB  {model.precision:<16}  {read}")
