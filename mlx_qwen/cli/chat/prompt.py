"""The prompt of a terminal with the extra `chat`: editing, history, several lines, completion."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from mlx_qwen.cli.chat.plain import PROMPT


class PromptReader:
    """Reads texts of any number of lines: Enter ends one, Alt-Enter or a backslash before Enter begins a new line.

    Args:
        history: the file in which texts are kept between sessions; None keeps them in memory.
        commands: words that Tab completes at the beginning.
        options: words that Tab completes behind /set.
    """

    def __init__(self, history: Path | None, *, commands: Sequence[str], options: Sequence[str]) -> None:
        kept: History = InMemoryHistory() if history is None else _Kept(str(history))
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation="... ",
            key_bindings=_bindings(),
            history=kept,
            completer=_Completer(commands, options),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """The next text; see `Reader`."""
        return self._session.prompt()


class _Kept(FileHistory):
    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk costs the history, not the conversation
            super().store_string(string.encode(errors="replace").decode())


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class _Completer(Completer):
    """Commands at the beginning, options behind /set, and paths behind commands that take one."""

    def __init__(self, commands: Sequence[str], options: Sequence[str]) -> None:
        self._commands = commands
        self._options = options
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """What the words so far can become."""
        command, behind, rest = document.text_before_cursor.partition(" ")
        if not behind:
            yield from _beginning_with(command, self._commands if command.startswith("/") else ())
        elif command == "/set":
            yield from _beginning_with(rest, self._options)
        elif command in ("/image", "/video", "/tools", "/save", "/load"):
            yield from self._paths.get_completions(Document(rest), complete_event)


def _beginning_with(word: str, words: Sequence[str]) -> Iterable[Completion]:
    return (Completion(one, start_position=-len(word)) for one in words if one.startswith(word))
