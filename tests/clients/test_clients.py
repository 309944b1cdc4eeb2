"""Five coding agents as their makers ship them, offline: each reads a file, edits it and answers.

They talk to the real engine with the bundled weights, whose tokens a script forces. `make clients` installs them.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_qwen.launch import CLIENTS
from tests.clients.conftest import PROGRAMS, ROOT, ScriptedServer, told

MEND, TELL, AGAIN = "Mend the typo in note.txt.", "Tell me what you changed.", "The note has a typo once more; mend it."
MENDED, CHANGED = "The note says world now.", "I changed wrld to world."
_PATCH = """apply_patch <<'EOF'
*** Begin Patch
*** Update File: note.txt
@@
-hello wrld
+hello world
*** End Patch
EOF"""
_DEAD = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Case:
    """How a client is asked once, how in its last session, the calls that mend a note, and its user's own settings."""

    ask: tuple[str, ...]
    ask_again: tuple[str, ...]
    calls: Callable[[str], list[list[object]]]
    settings: tuple[str, str]


def _claude(note: str) -> list[list[object]]:
    return [["Read", {"file_path": note}], ["Edit", {"file_path": note, "old_string": "wrld", "new_string": "world"}]]


def _codex(note: str) -> list[list[object]]:
    return [["exec_command", {"cmd": "cat note.txt"}], ["exec_command", {"cmd": _PATCH}]]


def _opencode(note: str) -> list[list[object]]:
    return [["read", {"filePath": note}], ["edit", {"filePath": note, "oldString": "wrld", "newString": "world"}]]


def _qwen(note: str) -> list[list[object]]:
    edit = {"file_path": note, "old_string": "wrld", "new_string": "world"}
    return [["read_file", {"file_path": note}], ["edit", edit]]


def _pi(note: str) -> list[list[object]]:
    return [["read", {"path": note}], ["edit", {"path": note, "edits": [{"oldText": "wrld", "newText": "world"}]}]]


_CLAUDE = ("-p", "--allowedTools=Read,Edit")
_CODEX = ("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
_QWEN = ("--approval-mode", "auto-edit", "-p")
# Settings that would lead elsewhere if they won.
CASES = {
    "claude": Case(
        _CLAUDE,
        (*_CLAUDE, "--continue"),
        _claude,
        (".claude/settings.json", f'{{"env": {{"ANTHROPIC_BASE_URL": "{_DEAD}", "ANTHROPIC_MODEL": "other"}}}}'),
    ),
    "codex": Case(
        _CODEX,
        (*_CODEX, "resume", "--last"),
        _codex,
        (".codex/config.toml", f'model = "other"\nopenai_base_url = "{_DEAD}"\n'),
    ),
    # This and Qwen Code would add the schema and the version themselves where they are missing.
    "opencode": Case(
        ("run",),
        ("run", "--continue"),
        _opencode,
        (
            ".config/opencode/opencode.json",
            '{"$schema": "https://opencode.ai/config.json", "model": "other/other"}',
        ),
    ),
    "qwen": Case(
        _QWEN,
        ("--continue", *_QWEN),
        _qwen,
        (
            ".qwen/settings.json",
            '{"$version": 4, "model": {"name": "other"}, "memory": {"enableManagedAutoMemory": false}, '
            f'"security": {{"auth": {{"selectedType": "openai", "baseUrl": "{_DEAD}"}}}}}}',
        ),
    ),
    "pi": Case(
        ("-p",),
        ("--continue", "-p"),
        _pi,
        (".pi/agent/settings.json", '{"defaultProvider": "anthropic", "defaultModel": "other"}'),
    ),
}


def ask(client: str, arguments: tuple[str, ...], home: Path, port: int) -> str:
    """Runs a client by `mlx-qwen launch` beside its note; what it printed. A dead proxy is all it knows beside."""
    environment = {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "PYTHONPATH": str(ROOT),
        "HTTP_PROXY": _DEAD,
        "HTTPS_PROXY": _DEAD,
        "NO_PROXY": "127.0.0.1",
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
    }
    command = [sys.executable, "-m", "mlx_qwen", "launch", client, "--port", str(port), "--", *arguments]
    run = subprocess.run(
        command,
        cwd=home / "work",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert run.returncode == 0, f"{client} ended with {run.returncode}:\n{run.stdout}\n{run.stderr}"
    return run.stdout


@pytest.mark.parametrize("client", CASES)
def test_a_client_reads_edits_and_answers_and_reads_on_from_what_is_cached(
    client: str, server: ScriptedServer, tmp_path: Path
) -> None:
    case, note = CASES[client], tmp_path / "work" / "note.txt"
    settings, chosen = tmp_path / case.settings[0], case.settings[1]
    for folder in (note.parent, tmp_path / "tmp", settings.parent):
        folder.mkdir(parents=True, exist_ok=True)
    note.write_text("hello wrld\n")
    settings.write_text(chosen)
    server.follow([[question, [*case.calls(str(note)), MENDED]] for question in (MEND, AGAIN)] + [[TELL, [CHANGED]]])

    assert MENDED in ask(client, (*case.ask, MEND), tmp_path, server.port)
    assert note.read_text() == "hello world\n"
    first = server.new_requests()
    assert len(first) >= 3, "it read, edited and answered"
    told(client, "first run", first)

    assert CHANGED in ask(client, (*case.ask_again, TELL), tmp_path, server.port)
    second = server.new_requests()
    told(client, "second turn", second)

    note.write_text("hello wrld\n")
    assert MENDED in ask(client, (*case.ask, AGAIN), tmp_path, server.port)
    assert note.read_text() == "hello world\n"
    third = server.new_requests()
    told(client, "second run", third)

    for requests in (first[1:], second, third):
        assert sum(one.cached for one in requests) >= 0.95 * sum(one.common for one in requests)
    assert settings.read_text() == chosen, "the user's own settings are left alone"
    assert not [path for path in (tmp_path / "tmp").iterdir() if path.name.startswith("mlx-qwen")]


def test_every_client_that_can_be_launched_is_run_here_as_it_was_tested() -> None:
    assert list(CASES) == list(CLIENTS)
    folder = ROOT / "tests" / "clients"
    pinned = json.loads((folder / "package.json").read_text())["dependencies"]
    locked = json.loads((folder / "package-lock.json").read_text())["packages"]
    for client in CLIENTS.values():
        assert locked[f"node_modules/{client.package}"]["version"] == pinned[client.package]
    assert all("integrity" in one for name, one in locked.items() if name and not one.get("inBundle"))
