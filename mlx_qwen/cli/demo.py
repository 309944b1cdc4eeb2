"""`mlx-qwen demo`: one answer of each kind from the bundled checkpoint, on any machine and without network."""

import random
import shlex
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_qwen.demo import demo_folder
from mlx_qwen.demo.tasks import Draw, arithmetic, clips, continuation, draw, pictures, recall, toolbox

if TYPE_CHECKING:
    from mlx_qwen.model import Model
    from mlx_qwen.prompt import Processor

_SHOWN: dict[str, tuple[Draw, ...]] = {
    "Text goes on": (continuation.tale, continuation.counting),
    "Arithmetic, at once and worked digit by digit": (arithmetic.direct, arithmetic.reasoned),
    "Recall from a list": (recall.one_question,),
    "A tool is called, and its response read": (toolbox.answered,),
    "A picture": (partial(pictures.one, questions=3, thinking=True),),
    "A sequence of frames": (partial(clips.happening, steps=4, questions=2),),
}


@click.command()
@click.option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    default="mlx-qwen-demo",
    show_default=True,
    help="Folder for the pictures that the model is shown.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Another number asks other questions.")
@click.option("--bits", type=click.Choice(["4", "8"]), help="Convert the model to 4 or 8 bits first.")
def command(save: Path, seed: int, bits: str | None) -> None:
    """Show one answer of each kind from the bundled checkpoint, the right answer beside it.

    The checkpoint is a Qwen3.5 MoE of 2.8 million parameters, with vision and MTP, trained for this demo on questions
    like these, but not on these.
    """
    from mlx_qwen.cli.examples import Asker

    asker = Asker(*_loaded(bits), save)
    for index, (title, tasks) in enumerate(_SHOWN.items(), 1):
        click.secho(f"\n{index}. {title}", bold=True)
        for task in tasks:
            asker.ask(draw(task, random.Random(f"{title} {seed}"), held_out=True))
    click.echo(f"\n{asker.right} of {asker.asked} answers are right. Your turn:")
    command = this_command()
    click.echo(f'  {command} generate --prompt "What is 358+67?" --enable-thinking')
    click.echo(f'  {command} generate --prompt "How many things are there?" --image {asker.pictures[0]}')
    click.echo(f"  {command} chat")
    click.echo(f'With a real model:\n  {command} generate --model Qwen/Qwen3.5-0.8B --prompt "Why is the sky blue?"')


def this_command() -> str:
    """How this command is called here: by its name where a shell finds it, else by its place."""
    name, called = "mlx-qwen", Path(sys.argv[0])
    if shutil.which(name) is not None:
        return name
    if called.name != name:
        return f"{shlex.quote(sys.executable)} -m mlx_qwen"
    here = Path.cwd()
    return shlex.quote(str(called.relative_to(here) if called.is_relative_to(here) else called))


def _loaded(bits: str | None) -> "tuple[Model, Processor]":
    """The bundled checkpoint, as it is or converted by this package."""
    from mlx_qwen.convert import convert
    from mlx_qwen.loading import load

    if bits is None:
        return load()
    with tempfile.TemporaryDirectory() as folder:
        click.echo(convert(demo_folder(), folder, bits=int(bits), overwrite=True).table())
        return load(folder)
