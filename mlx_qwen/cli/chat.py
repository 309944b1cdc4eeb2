"""`mlx-qwen chat`: a conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Unpack

import click

from mlx_qwen.cli.options import chosen_model, generation_flags, model_flags
from mlx_qwen.errors import PromptError
from mlx_qwen.options import OptionKeywords, options_and_settings

if TYPE_CHECKING:
    from mlx_qwen.conversation import Conversation

_HELP = """/image PATH     show an image with the next question; several at once, one a line; a URL works too
/video PATH     show a video with the next question
/reset          forget the conversation
/system TEXT    set the system message and start anew; without TEXT, remove it
/help           show this list
/quit           leave (so does Ctrl-D; Ctrl-C stops an answer)"""


@click.command()
@model_flags
@generation_flags(max_tokens=32768, media=False)
@click.option("--verbose/--quiet", default=False, help="Statistics after each answer.  [default: quiet]")
def command(
    model: str | None, revision: str | None, system_prompt: str | None, verbose: bool, **flags: Unpack[OptionKeywords]
) -> None:
    """Talk with a model, turn by turn."""
    path = chosen_model(model)

    from mlx_qwen.conversation import Conversation
    from mlx_qwen.engine.caching import kv_cache_summary
    from mlx_qwen.loading import load

    flags["progress"] = sys.stderr.isatty()
    _, settings = options_and_settings(flags)  # checked before the model is loaded
    loaded, processor = load(path, revision=revision)
    conversation = Conversation(loaded, processor, system=system_prompt, **flags)
    click.echo(f"{path or 'The bundled demo'}. /help lists what you can type besides questions.")
    if settings.kv_bits is not None:
        click.echo(kv_cache_summary(loaded, settings.kv_bits), err=True)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if not _obey(line, conversation):
                return
        elif line:
            _answer(conversation, line, verbose=verbose)


def _read_line() -> str | None:
    """The next line that is typed; None at the end of the input."""
    try:
        return input(">>> ").strip()
    except EOFError:
        click.echo()
        return None


def _obey(line: str, conversation: "Conversation") -> bool:
    """Runs a slash command; False when it ends the conversation."""
    word, _, rest = line.partition(" ")
    if word == "/quit":
        return False
    if word in ("/image", "/video"):
        _attach(conversation, word.removeprefix("/"), rest.strip())
    elif word == "/reset":
        conversation.reset()
    elif word == "/system":
        conversation.system = rest.strip() or None
        conversation.reset()
    elif word == "/help":
        click.echo(_HELP)
    else:
        click.echo(f"Unknown command {word}; /help lists them.", err=True)
    return True


def _attach(conversation: "Conversation", kind: str, source: str) -> None:
    from mlx_qwen.media.grids import Kind

    if not source:
        click.echo(f"/{kind} needs the path or URL of the {kind}.", err=True)
        return
    try:
        click.echo(f"{conversation.attach(Kind[kind.upper()], source)}; it goes with your next question.", err=True)
    except PromptError as error:
        click.echo(f"Error: {error}", err=True)


def _answer(conversation: "Conversation", question: str, *, verbose: bool) -> None:
    from mlx_qwen.cli.printer import AnswerPrinter

    try:
        turn = conversation.ask(question)
    except PromptError as error:
        click.echo(f"Error: {error} /reset starts anew.", err=True)
        return
    printer = AnswerPrinter()
    try:
        for response in turn:
            printer.push(response)
    except KeyboardInterrupt:
        click.echo(" (stopped)", nl=False)
    printer.finish()
    conversation.remember(turn)
    if verbose and turn.last is not None:
        click.echo(turn.last.statistics(), err=True)
