"""One run of a client: it has the terminal, and what was made for it goes with it."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mlx_qwen.errors import PromptError
from mlx_qwen.launch.clients import CLIENTS, Needs, Served, needs_of

# The terminal sends these to the client too, which knows what they mean in it; the others ask this process to end.
_CLIENTS_OWN = (signal.SIGINT, signal.SIGQUIT)
_TO_PASS_ON = (signal.SIGTERM, signal.SIGHUP)


def program_of(name: str) -> str:
    """The client's program; raises PromptError that says how to install it."""
    client = CLIENTS[name]
    program = shutil.which(client.program)
    if program is None:
        raise PromptError(
            f"{client.title} is not installed: there is no {client.program} on the PATH. Install it with: "
            f"npm install -g {client.package}"
        )
    return program


def run_client(name: str, served: Served, arguments: Sequence[str]) -> int:
    """Runs a client to its end; its exit code, or 128 and the number of the signal that ended it."""
    program = program_of(name)
    with tempfile.TemporaryDirectory(prefix="mlx-qwen-launch-") as folder:
        needs = needs_of(name, served, Path(folder))
        write_files(needs, Path(folder))
        with _signals() as child:
            child.append(subprocess.Popen([program, *needs.arguments, *arguments], env=environment(needs)))
            code = child[0].wait()
    return code if code >= 0 else 128 - code


def write_files(needs: Needs, folder: Path) -> None:
    """Put what a client reads into its folder."""
    for file, text in needs.files.items():
        (folder / file).write_text(text, encoding="utf-8")


def environment(needs: Needs) -> dict[str, str]:
    """This process's variables with the client's own."""
    changed = {**os.environ, **needs.environment}
    return {name: value for name, value in changed.items() if value is not None}


@contextmanager
def _signals() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Leaves Ctrl-C to the client in the list, and passes on to it what would end this process."""
    child: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for one in child:
            one.send_signal(number)

    # Functions rather than SIG_IGN, which the client would inherit.
    handlers = {number: (lambda *_: None) for number in _CLIENTS_OWN} | dict.fromkeys(_TO_PASS_ON, pass_on)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield child
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
