"""Commands that run on several Macs at once: `mlx.launch` starts them on each, and rank 0's is the one that is used."""

import sys
from typing import TYPE_CHECKING

import click

from mlx_qwen.distributed.environment import own_rank

if TYPE_CHECKING:
    from mlx_qwen.distributed.leader import Leader
    from mlx_qwen.model import Model
    from mlx_qwen.prompt import Processor
    from mlx_qwen.settings import EngineSettings

_led: "list[Leader]" = []
_PIPELINE, _BEGUN = f"{__name__}.pipeline", f"{__name__}.begun"


def _note_pipeline(context: click.Context, flag: click.Parameter, given: bool) -> None:
    if given and own_rank() is None:
        raise click.UsageError("--pipeline divides a model among several Macs; start the command with mlx.launch.")
    context.meta[_PIPELINE] = given


pipeline_flag = click.option(
    "--pipeline",
    is_flag=True,
    expose_value=False,
    callback=_note_pipeline,
    help="Give each of several Macs whole layers, as many as its memory has room for, instead of a part of each.",
)


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def followed(words: tuple[str, ...]) -> None:
    """Do what rank 0 says: all flags are its own, files that they name included."""
    if {"-h", "--help"} & set(words):
        return
    from mlx_qwen.distributed.start import follow

    follow()


def load_here(
    path: str | None, settings: "EngineSettings", *, revision: str | None = None
) -> "tuple[Model, Processor]":
    """What `load` gives; where this is rank 0 of several, with all of them ready to follow until the command ends.

    Raises PromptError, before anything is loaded, for settings that several cannot work with.
    """
    if own_rank() is None:
        from mlx_qwen.loading import load

        return load(path, revision=revision)

    from mlx_qwen.distributed.start import Wanted, lead
    from mlx_qwen.distributed.wire import check_settings

    check_settings(settings)
    click.get_current_context().meta[_BEGUN] = True
    pipeline = click.get_current_context().meta.get(_PIPELINE, False)
    model, processor, leader = lead(Wanted(path, revision, pipeline=pipeline))
    _led.append(leader)
    click.get_current_context().find_root().call_on_close(part)
    return model, processor


def part() -> None:
    """Let the other ranks end, if there are any: with a failure of their own where an error ends this one."""
    error = sys.exc_info()[1]
    failed = error is not None and bool(getattr(error, "code", True) or getattr(error, "exit_code", True))
    for leader in _led:
        leader.close(str(error) or type(error).__name__ if failed else "")
    _led.clear()


def dismiss(context: click.Context, error: click.ClickException) -> None:
    """Show what is wrong with rank 0's command, let the others end with it, which wait for that, and end it."""
    if context.meta.get(_BEGUN):
        return
    from mlx_qwen.distributed.start import dismiss

    error.show()
    dismiss(error.format_message())
    context.exit(error.exit_code)


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def refused(context: click.Context, words: tuple[str, ...]) -> None:
    """Say once that a command that one Mac runs was started on several: each would do all of its work."""
    if own_rank():
        context.exit(2)
    raise click.UsageError(f"mlx-qwen {context.info_name} runs on one Mac: start it without mlx.launch.")


def refuse_stdin() -> None:
    """Raises UsageError where standard input would never end: mlx.launch hands on what is typed, but not the end."""
    if own_rank() is not None:
        raise click.UsageError(
            "mlx.launch never ends standard input, so that a prompt cannot be read from it. Give it as an argument, or "
            "with --prompt-file."
        )


def refuse_prompt_cache() -> None:
    """Raises UsageError on one of several: a file holds what a whole model has read, and each needs its own part."""
    if own_rank() is not None:
        raise click.UsageError(
            "--prompt-cache-file holds what one Mac has read, and each of several needs its own share. Give "
            "--prefix-cache-dir and the whole prompt instead: what was read of it before is not read again."
        )
