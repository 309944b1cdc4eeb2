"""`mlx-qwen launch`: a coding agent on a server of this machine."""

import shlex
from dataclasses import replace
from pathlib import Path

import click

from mlx_qwen.launch import CLIENTS, Needs, Served, needs_of, run_client, serving
from mlx_qwen.launch.clients import NO_KEY
from mlx_qwen.launch.running import program_of
from mlx_qwen.launch.serving import HOST, PORT, find, name_of


@click.command()
@click.argument("client", type=click.Choice(list(CLIENTS)))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--model", metavar="PATH|REPO", help="What the client talks to.  [default: the server's first]")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=PORT,
    show_default=True,
    help="Where a server may run already. Without one that has the model, one is started for this run.",
)
@click.option("--print", "show", is_flag=True, help="Show what the client would be started with, and start nothing.")
@click.pass_context
def command(
    ctx: click.Context, client: str, arguments: tuple[str, ...], model: str | None, port: int, *, show: bool
) -> None:
    """Run a coding agent, such as Claude Code or Codex, on a model of this machine.

    What stands behind -- are the client's own arguments: mlx-qwen launch claude -- --continue. It gets the server's
    address and the model by its environment, arguments and a temporary file; its own settings stay as they are.
    """
    if show:
        served = find(model, port=port) or Served(f"http://{HOST}:{port}", name_of(model))
        key = served.key if served.key == NO_KEY else "..."
        _show(client, needs_of(client, replace(served, key=key), Path("FOLDER")), arguments)
        return
    program_of(client)
    with serving(model, port=port) as served:
        click.echo(f"{CLIENTS[client].title} talks to {served.model} at {served.url}.", err=True)
        code = run_client(client, served, arguments)
    ctx.exit(code)


def _show(client: str, needs: Needs, arguments: tuple[str, ...]) -> None:
    """As a shell would be told it."""
    for file, text in needs.files.items():
        click.echo(f"# FOLDER/{file}:\n{text.rstrip()}\n")
    for name, value in needs.environment.items():
        click.echo(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    click.echo(shlex.join([CLIENTS[client].program, *needs.arguments, *arguments]))
