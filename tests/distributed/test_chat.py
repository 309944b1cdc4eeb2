"""`mlx-qwen chat` on two ranks: a session on a terminal of rank 0, whose other rank says nothing and keeps step."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ranks import ROOT
from tests.support.terminal import PATIENCE, Terminal
from tools.benchmarks.rings import ring

ENTER = "\r"
# With the demo's end tokens banned, it writes on.
CHAT = ("chat", "--temp", "0", "--logit-bias", '{"626": -100, "628": -100}')


@contextmanager
def chatting(folder: Path) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    """A terminal with a chat's first prompt, and the process of the other rank; answers end at Ctrl-C alone."""
    ours, theirs = ring(2, folder)
    command = [sys.executable, "-m", "mlx_qwen", *CHAT]
    with (folder / "other").open("w") as said:
        other = subprocess.Popen(
            command, cwd=ROOT, env=theirs, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT
        )
    named = {name: ours[name] for name in ("MLX_RANK", "MLX_HOSTFILE")}
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        with Terminal(*CHAT, cwd=folder, env={**named, **path}) as terminal:
            terminal.wait_for_prompt()
            yield terminal, other
    finally:
        other.kill()
        other.wait()


def ask(terminal: Terminal, text: str) -> str:
    """Type a line and wait for the next prompt; what was printed meanwhile."""
    terminal.type(text + ENTER)
    return terminal.wait_for_prompt()


def test_ctrl_c_ends_an_answer_or_clears_a_line_and_the_ranks_stay_in_step(tmp_path: Path) -> None:
    with chatting(tmp_path) as (terminal, other):
        terminal.type(f"What is 12+30?{ENTER}")
        terminal.wait_for("42")
        terminal.type("\x03")
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for_prompt()
        ask(terminal, "/set logit_bias default")
        assert "7" in ask(terminal, "What is 3+4?")
        terminal.type("never asked")
        terminal.wait_for("never asked")
        terminal.interrupt()
        assert "42" in ask(terminal, "What is 12+30?")
        terminal.type(f"/exit{ENTER}")
        assert terminal.end() == 0
        assert other.wait(PATIENCE) == 0
        assert (tmp_path / "other").read_text() == ""


def test_a_rank_that_is_killed_while_nothing_is_asked_ends_the_chat_and_leaves_the_terminal_as_it_was(
    tmp_path: Path,
) -> None:
    with chatting(tmp_path) as (terminal, other):
        typing = terminal.modes()
        terminal.type("half a line")
        terminal.wait_for("half a line")
        other.kill()
        terminal.wait_for(r"Error: Rank 1 \(.*\) has gone")
        assert terminal.end() == 1
        assert terminal.modes() != typing
        assert terminal.modes() == terminal.fresh


def test_a_rank_that_is_killed_in_an_answer_ends_the_chat_with_one_error(tmp_path: Path) -> None:
    with chatting(tmp_path) as (terminal, other):
        terminal.type(f"What is 12+30?{ENTER}")
        terminal.wait_for("42")
        other.kill()
        assert terminal.end() == 1
        assert terminal.output.count("Error: ") == 1
        assert "Error: Rank 1 (" in terminal.output
        assert terminal.modes() == terminal.fresh
