"""`mlx-qwen chat`: a conversation in the terminal."""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Unpack

import click

from mlx_qwen.cli.options import chosen_model, generation_flags, model_flags
from mlx_qwen.cli.several import load_here
from mlx_qwen.keywords import OptionKeywords, options_and_settings

if TYPE_CHECKING:
    from mlx_qwen.cli.chat.plain import Reader
    from mlx_qwen.cli.chat.talk import Talk


@click.command()
@model_flags
@generation_flags(max_tokens=32768, media=False)
@click.option("--verbose/--quiet", default=False, help="Statistics after each answer.  [default: quiet]")
def command(
    model: str | None, revision: str | None, system_prompt: str | None, verbose: bool, **flags: Unpack[OptionKeywords]
) -> None:
    """Talk with a model, turn by turn.

    /help lists what can be typed besides questions. The extra `chat` adds Markdown, editing over several lines, and a
    history that is kept between sessions in a file that only you can read; MLX_QWEN_HISTORY=0 turns that off.
    """
    path = chosen_model(model)

    from mlx_qwen.cli.chat.talk import Talk
    from mlx_qwen.conversation import Conversation
    from mlx_qwen.engine.caching import kv_cache_summary

    flags["progress"] = sys.stderr.isatty()
    _, settings = options_and_settings(flags)  # checked before the model is loaded
    reader, rich = _reader()
    loaded, processor = load_here(path, settings, revision=revision)
    conversation = Conversation(loaded, processor, system=system_prompt, **flags)
    click.echo(f"{path or 'The bundled demo'}. /help lists what you can type besides questions.")
    if settings.kv_bits is not None:
        click.echo(kv_cache_summary(loaded, settings.kv_bits), err=True)
    _converse(reader, Talk(conversation, model=path or "the bundled demo", verbose=verbose, rich=rich))


def _reader() -> "tuple[Reader, bool]":
    """The best prompt that this terminal can have, and whether it can show Markdown."""
    from mlx_qwen.cli.chat.plain import PlainReader

    watched = sys.stdin.isatty() and sys.stdout.isatty()
    if not watched or os.environ.get("TERM", "dumb") == "dumb":
        return PlainReader(), False
    try:
        import_module("rich.markdown")
        from mlx_qwen.cli.chat.prompt import PromptReader
    except ImportError:
        click.echo("For Markdown, editing and a history, run: pip install 'mlx-qwen[chat]'", err=True)
        return PlainReader(), False

    from mlx_qwen.cli.chat.commands import COMMANDS
    from mlx_qwen.cli.chat.history import history_file
    from mlx_qwen.cli.chat.typed import option_names

    return PromptReader(history_file(), commands=[*COMMANDS], options=option_names()), True


def _converse(reader: "Reader", talk: "Talk") -> None:
    """Reads questions and commands until the end; no error ends the conversation, nor Ctrl-C on a terminal."""
    from mlx_qwen.cli.chat.commands import obey
    from mlx_qwen.cli.failures import is_device_failure, told
    from mlx_qwen.errors import MLXQwenError, RanksEndedError

    while True:
        try:
            if text := reader.read().strip():
                obey(talk, text)
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            click.echo()
        except RanksEndedError:
            raise
        except MLXQwenError as error:
            click.echo(f"Error: {error}", err=True)
        except (RuntimeError, MemoryError) as error:
            if not is_device_failure(error):
                raise
            click.echo(f"Error: {told(error)}", err=True)
