"""A rank that dies, stands still or is another: within seconds every rank ends with one clear error, and none hangs."""

import os
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import pytest

from mlx_qwen.demo import demo_folder
from tests.distributed.processes import Ranks, ranks

# Ten seconds are promised of Macs that do nothing else; here other tests run beside.
PATIENCE = 20.0
# The demo's end tokens: with them banned, it writes on.
ENDS = (626, 628)


@contextmanager
def answering(prompt_tokens: int, written: int) -> Iterator[Ranks]:
    """A server on two ranks that reads a prompt of so many tokens and writes an answer; at once, if there is one."""
    with ranks(2, "serve", "--port", 0, "--prefill-step-size", 16) as started:
        url = started.url()
        if prompt_tokens:
            ids = ", ".join(str(3 + i % 200) for i in range(prompt_tokens))
            banned = ", ".join(f'"{token}": -100' for token in ENDS)
            body = f'{{"prompt": [{ids}], "max_tokens": {written}, "logit_bias": {{{banned}}}, "stream": true}}'
            wrote, over = threading.Event(), threading.Event()
            threading.Thread(target=_reads, args=(url, body, wrote, over), daemon=True).start()
            if written > 1:
                assert wrote.wait(60)
            else:
                time.sleep(0.5)
                assert not wrote.is_set()
            assert not over.is_set()
        yield started


def _reads(url: str, body: str, wrote: threading.Event, over: threading.Event) -> None:
    request = urllib.request.Request(f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    try:
        with suppress(ConnectionError, HTTPException), urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data:"):
                    wrote.set()
    finally:
        over.set()


def errors(started: Ranks, rank: int) -> list[str]:
    return [line for line in started.err(rank).splitlines() if line.startswith("Error: ")]


@pytest.mark.parametrize(
    ("prompt_tokens", "written"), [(0, 0), (4000, 1), (20, 4000)], ids=["idle", "prefill", "decoding"]
)
def test_a_killed_rank_ends_the_other_with_its_name(prompt_tokens: int, written: int) -> None:
    with answering(prompt_tokens, written) as started:
        started.processes[1].kill()
        assert started.ended(PATIENCE) == [1, -signal.SIGKILL]
        (error,) = errors(started, 0)
        assert "ank 1" in error
        assert "has gone" in error
        assert "Traceback" not in started.err(0)


def test_when_rank_0_is_killed_the_other_ends_too() -> None:
    with answering(20, 4000) as started:
        started.processes[0].kill()
        assert started.ended(PATIENCE) == [-signal.SIGKILL, 1]
        assert errors(started, 1) == [
            "Error: Rank 0 has gone: it ended, was killed, or its connection broke. All ranks end; start them again."
        ]


def test_a_rank_that_stands_still_ends_all_also_itself_when_it_wakes() -> None:
    with answering(20, 4000) as started:
        os.kill(started.processes[1].pid, signal.SIGSTOP)
        assert started.processes[0].wait(PATIENCE) == 1
        os.kill(started.processes[1].pid, signal.SIGCONT)
        assert started.ended(PATIENCE) == [1, 1]
        (error,) = errors(started, 0)
        assert "stands still: nothing came from it for 7 s" in error
        assert len(errors(started, 1)) == 1


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
    with ranks(1, "generate", changes={0: {"MLX_WORLD_SIZE": "2"}}) as started:
        assert started.ended(60) == [2]
        assert "mlx.launch never ends standard input" in started.err(0)
