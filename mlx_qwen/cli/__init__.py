"""The `mlx-qwen` command. Sub-commands are imported when they are used, so that help is there at once."""

import errno
import importlib
import io
import sys
import time
import warnings
from typing import TextIO

import click

from mlx_qwen.cli.failures import is_device_failure, told
from mlx_qwen.distributed.environment import own_rank
from mlx_qwen.errors import MLXQwenError, RanksEndedError

# What `mlx-qwen --help` says of each command: its module's docstring would cost the import.
COMMANDS = {
    "generate": "Write an answer to one prompt.",
    "cache-prompt": "Read a text once, and keep what the model remembers of it in a file.",
    "chat": "Talk with a model, turn by turn.",
    "serve": "Answer requests in OpenAI's and Anthropic's protocols.",
    "launch": "Run a coding agent, such as Claude Code or Codex, on a model of this machine.",
    "convert": "Convert a checkpoint to MLX, quantized to 4.6 bits a weight unless told otherwise.",
    "compare": "Measure how far the model OTHER is from the model REFERENCE, such as a conversion from its source.",
    "plan": "Work out what a model needs, whether it fits, and what bounds its speed.",
    "models": "List the models in the Hub's cache: size, precision, and which runtimes load them.",
    "pull": "Download a model into the Hub's cache: of a size such as 9B a conversion to 4 bits, or a repository.",
    "demo": "Show one answer of each kind from the bundled checkpoint, the right answer beside it.",
    "doctor": "Check this machine and run each kernel's parity probe on its GPU.",
    "bench": "Measure prefill, decode and memory of a model, beside mlx-lm and mlx-vlm in alternation.",
}

INTERRUPTED = 130
# Seconds in which the thread that ends all ranks says why, and ends this process.
_PARTING = 10.0
# What several Macs do as one, where mlx.launch starts it on each.
TOGETHER = ("generate", "chat", "serve")
# What each of them would do whole, to the same files or beside the others.
ALONE = ("cache-prompt", "launch", "convert", "compare", "demo", "bench")


class LazyGroup(click.Group):
    """A command group that knows its commands by name, and turns the project's errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name in TOGETHER and own_rank():
            from mlx_qwen.cli.several import followed

            return followed
        if cmd_name in ALONE and own_rank() is not None:
            from mlx_qwen.cli.several import refused

            return refused
        command = importlib.import_module(f"mlx_qwen.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command), "every module of a sub-command defines `command`"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return self._invoke(ctx)
        except click.ClickException as error:
            if ctx.invoked_subcommand in TOGETHER and own_rank() == 0:
                from mlx_qwen.cli.several import dismiss

                dismiss(ctx, error)
            raise

    def _invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except RanksEndedError as error:
            time.sleep(_PARTING)
            raise click.ClickException(str(error)) from error
        except MLXQwenError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly when a pipe's reader has gone
                raise
            _drop_unwritten_output()
            raise click.ClickException(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if not is_device_failure(error):
                raise
            raise click.ClickException(told(error)) from error
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mlx-qwen")
def main() -> None:
    """Run and convert Qwen3.5 models with MLX."""
    warnings.showwarning = _show_warning
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments, so that bad bytes reach the one check


def _drop_unwritten_output() -> None:
    """What a full disk did not take would be written, and fail, once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = io.StringIO()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {message}", err=True)
