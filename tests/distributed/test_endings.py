"""A rank that dies, stands still or is another: within seconds every rank ends with one clear error, and none hangs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_qwen.cli import main
from mlx_qwen.demo import demo_folder
from tests.distributed.processes import Ranks, ranks
from tests.support.ranks import ROOT
from tools.benchmarks.rings import ring

# Ten seconds are promised of Macs that do nothing else; here other tests run beside.
PATIENCE = 20.0
# With the demo's end tokens banned, it writes on.
ENDLESS = ("--logit-bias", '{"626": -100, "628": -100}')
HI = [{"role": "user", "content": "Hi"}]


class Client(threading.Thread):
    """Asks a server, and notes the status and the lines that come until the answer ends."""

    def __init__(self, url: str, path: str, body: dict[str, object]) -> None:
        super().__init__(daemon=True)
        headers = {"Content-Type": "application/json"}
        self._request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers)
        self.lines: list[str] = []
        self.status = 0
        self.wrote = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            with suppress(ConnectionError, HTTPException), self._answered() as response:
                self.status = response.status
                for line in response:
                    self.lines.append(line.decode().strip())
                    if line.startswith(b"data:"):
                        self.wrote.set()
        finally:
            self.wrote.set()

    def _answered(self) -> Any:
        try:
            return urllib.request.urlopen(self._request, timeout=60)
        except urllib.error.HTTPError as error:
            return error

    def last(self) -> Any:
        """What came last, as JSON."""
        self.join(PATIENCE)
        found = [line.removeprefix("data: ") for line in self.lines if line.removeprefix("data: ").startswith("{")]
        return json.loads(found[-1]) if found else None


@contextmanager
def serving() -> Iterator[Ranks]:
    """A server on two ranks whose answers end at their limit of tokens alone."""
    with ranks(2, "serve", "--port", 0, "--prefill-step-size", 16, *ENDLESS) as started:
        yield started


@contextmanager
def answering(prompt_tokens: int, written: int) -> Iterator[tuple[Ranks, Client | None]]:
    """A server that reads a prompt of so many tokens and writes an answer; at once, if there is one."""
    with serving() as started:
        url, client = started.url(), None
        if prompt_tokens:
            prompt = [3 + i % 200 for i in range(prompt_tokens)]
            client = Client(url, "completions", {"prompt": prompt, "max_tokens": written, "stream": True})
            if written > 1:
                assert client.wrote.wait(60)
            else:
                time.sleep(0.5)
                assert not client.wrote.is_set()
            assert client.is_alive()
        yield started, client


def errors(started: Ranks, rank: int) -> list[str]:
    return [line for line in started.err(rank).splitlines() if line.startswith("Error: ")]


def told_of_the_killed(started: Ranks) -> str:
    """Kill rank 1: the one error that rank 0 ends with, which says so."""
    started.processes[1].kill()
    assert started.ended(PATIENCE) == [1, -signal.SIGKILL]
    (error,) = errors(started, 0)
    assert "ank 1" in error
    assert "has gone" in error
    assert "Traceback" not in started.err(0)
    return error


@pytest.mark.parametrize(("prompt_tokens", "written"), [(0, 0), (4000, 1)], ids=["idle", "prefill"])
def test_a_killed_rank_ends_the_other_with_its_name(prompt_tokens: int, written: int) -> None:
    with answering(prompt_tokens, written) as (started, client):
        error = told_of_the_killed(started)
        if client is not None:
            assert client.last()["error"]["message"] == error.removeprefix("Error: ")


def test_when_a_rank_is_killed_in_decoding_every_client_gets_the_error_as_its_protocol_has_it() -> None:
    with serving() as started:
        most = {"max_tokens": 4000}
        asked: dict[str, dict[str, object]] = {
            "completions": {"prompt": "Hi", "stream": True, **most},
            "chat/completions": {"messages": HI, "stream": True, **most},
            "messages": {"messages": HI, "stream": True, **most},
            "responses": {"input": "Hi", "stream": True, "max_output_tokens": 4000},
        }
        url = started.url()
        streamed = {path: Client(url, path, body) for path, body in asked.items()}
        whole = {path: Client(url, path, {**body, "stream": False}) for path, body in asked.items()}
        for client in streamed.values():
            assert client.wrote.wait(60)
        error = told_of_the_killed(started)
    said = error.removeprefix("Error: ")
    assert {client.status for client in streamed.values()} == {200}
    assert {client.status for client in whole.values()} == {503}
    for path in ("completions", "chat/completions"):
        assert {key: streamed[path].last()["error"][key] for key in ("message", "type")} == {
            "message": said,
            "type": "server_error",
        }
    assert streamed["messages"].last() == {"type": "error", "error": {"type": "overloaded_error", "message": said}}
    failed = streamed["responses"].last()
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": said}
    for path, client in whole.items():
        assert client.last()["error"]["message"] == said
        assert client.last()["error"]["type"] == ("overloaded_error" if path == "messages" else "server_error")


def test_when_rank_0_is_killed_the_other_ends_too() -> None:
    with answering(20, 4000) as (started, _):
        started.processes[0].kill()
        assert started.ended(PATIENCE) == [-signal.SIGKILL, 1]
        assert errors(started, 1) == [
            "Error: Rank 0 has gone: it ended, was killed, or its connection broke. All ranks end; start them again."
        ]


def test_a_rank_that_stands_still_ends_all_also_itself_when_it_wakes() -> None:
    with answering(20, 4000) as (started, _):
        os.kill(started.processes[1].pid, signal.SIGSTOP)
        assert started.processes[0].wait(PATIENCE) == 1
        os.kill(started.processes[1].pid, signal.SIGCONT)
        assert started.ended(PATIENCE) == [1, 1]
        (error,) = errors(started, 0)
        assert "stands still: nothing came from it for 7 s" in error
        assert len(errors(started, 1)) == 1


def test_a_rank_that_lives_and_computes_no_more_ends_all_with_one_error(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import time, mlx_qwen.engine.engine as e\nown, turns = e.Engine.follow, []\n"
        "def follow(self, turn):\n"
        "    turns.append(time.sleep(1000) if len(turns) == 40 else None)\n"
        "    return own(self, turn)\n"
        "e.Engine.follow = follow\n"
    )
    with ranks(2, "generate", "Hi", *ENDLESS, changes={1: {"PYTHONPATH": str(tmp_path)}}) as started:
        # Seven seconds, and eight times what a token takes, which is much where other tests run beside.
        assert started.ended(90) == [1, 1]
        for rank in range(2):
            (error,) = errors(started, rank)
            assert "No rank has finished a step for " in error


def test_a_rank_that_writes_other_tokens_is_named_and_ends_all(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import mlx_qwen.distributed.pace as p\nown = p.Record.step\n"
        "p.Record.step = lambda *a: own(*a)._replace(digest='another')\n"
    )
    with ranks(2, "generate", "Hi", *ENDLESS, changes={1: {"PYTHONPATH": str(tmp_path)}}) as started:
        assert started.ended(60) == [1, 1]
        for rank in range(2):
            (error,) = errors(started, rank)
            assert "Rank 1 wrote other tokens than rank 0" in error


def test_another_checkpoint_is_refused_with_both_named(tmp_path: Path) -> None:
    # Each rank finds its own folder under the same name.
    for name in ("zero", "one"):
        shutil.copytree(demo_folder(), tmp_path / name / "model")
    config = tmp_path / "one" / "model" / "config.json"
    config.write_text(config.read_text() + "\n")
    changes = {0: {"HOME": str(tmp_path / "zero")}, 1: {"HOME": str(tmp_path / "one")}}
    with ranks(2, "generate", "Hi", "--model", "~/model", changes=changes) as started:
        assert started.ended(60) == [1, 1]
        (error,) = errors(started, 0)
        assert "Ranks hold different checkpoints" in error
        assert str(tmp_path / "zero" / "model") in error
        assert str(tmp_path / "one" / "model") in error
        assert "config.json" in error


def test_another_version_is_refused_with_both_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import mlx_qwen.version as v\nv.__version__ = '9.9.9'\n")
    with ranks(2, "generate", "Hi", changes={1: {"PYTHONPATH": str(tmp_path)}}) as started:
        assert started.ended(60) == [1, 1]
        for rank in range(2):
            (error,) = errors(started, rank)
            assert "Ranks run different versions of mlx-qwen: rank 0" in error
            assert "9.9.9" in error


def test_a_prompt_from_standard_input_is_refused_and_ends_all() -> None:
    with ranks(2, "generate") as started:
        assert started.ended(60) == [2, 1]
        assert "mlx.launch never ends standard input" in started.err(0)


def test_rank_0_waits_no_longer_than_it_says_for_a_rank_that_does_not_come(tmp_path: Path) -> None:
    script = "from mlx_qwen.distributed.environment import joined\njoined(2)"
    command, environment = [sys.executable, "-c", script], ring(2, tmp_path)[0]
    alone = subprocess.run(
        command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert "MLXQwenError: The ranks did not come together within 2 s." in alone.stderr


def test_a_word_too_many_on_rank_0_ends_all_at_once() -> None:
    with ranks(2, "generate", "Hi", "--no-such-flag") as started:
        assert started.ended(PATIENCE) == [2, 1]
        assert "No such option '--no-such-flag'" in started.err(0)
        assert "Error" not in started.err(1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["convert", "--model", "any"], "mlx-qwen convert runs on one Mac: start it without mlx.launch."),
        (["bench"], "mlx-qwen bench runs on one Mac"),
        (["generate", "Hi", "--prompt-cache-file", "any"], "--prompt-cache-file holds what one Mac has read"),
        (["serve", "--model", "one", "--model", "other"], "Several Macs share one model at a time"),
    ],
    ids=["convert", "bench", "prompt cache", "models"],
)
def test_what_only_one_mac_does_is_refused_before_anything_is_loaded(words: list[str], said: str) -> None:
    several = {"MLX_WORLD_SIZE": "2", "MLX_RANK": "0"}
    result = CliRunner().invoke(main, words, env=several)
    assert result.exit_code in (1, 2)
    assert said in result.output
    assert CliRunner().invoke(main, ["convert"], env={**several, "MLX_RANK": "1"}).output == ""
