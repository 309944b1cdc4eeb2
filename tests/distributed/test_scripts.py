"""A Python script on two ranks is that of one: rank 0 runs it, and the other follows whatever it asks for."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

from tests.support.ranks import ROOT, in_processes
from tools.benchmarks.rings import ring

PAGE = ROOT / "docs" / "several-macs.md"
OUT_OF_STEP = """
import sys
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx_qwen

group = mx.distributed.init()
rank = group.rank()
loaded = mlx_qwen.load(sys.argv[1] if rank == 0 else "elsewhere", group=group, dtype=mx.float32)
ask = lambda prompt: mlx_qwen.generate(*loaded, prompt, max_tokens=12, temperature=0)
PROMPTS = [f"{rank}: name {count} colours." for count in range(3)]
alone = [ask(prompt) for prompt in PROMPTS]
for steps in range(2):
    left = mlx_qwen.stream_generate(*loaded, PROMPTS[0], max_tokens=400)
    for _ in range(steps):
        next(left)
    left.close()
with ThreadPoolExecutor(3) as pool:
    assert list(pool.map(ask, PROMPTS)) == alone
assert mlx_qwen.batch_generate(*loaded, PROMPTS, max_tokens=12, temperature=0) == alone


def refused(work):
    try:
        work()
    except mlx_qwen.MLXQwenError as error:
        print(error)


refused(lambda: loaded[0](mx.array([[1, 2]])))
refused(lambda: mlx_qwen.load(sys.argv[1], group=group))
refused(lambda: mlx_qwen.generate(*loaded, "Hi", prompt_cache=loaded[0].make_cache()))
norm = loaded[0].norm
norm.weight = norm.weight * 2
refused(lambda: ask("Hi"))
raise LookupError("the script's own")
"""


def test_the_script_of_the_docs_prints_on_two_ranks_what_it_prints_on_one(folder: Path, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(script.splitlines()) <= 15
    script = script.replace("qwen3.5-0.8b", str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as one:
        exec(compile(script, PAGE.name, "exec"), {})
    assert one.getvalue().strip()
    assert in_processes(2, script, folder=tmp_path, patience=60) == [one.getvalue(), ""]


def test_what_only_one_rank_does_is_followed_or_refused_and_an_error_ends_all(folder: Path, tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", OUT_OF_STEP, str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for environment in ring(2, tmp_path)
    ]
    try:
        (said, why), (nothing, quiet) = [one.communicate(timeout=60) for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert why.rstrip().endswith("LookupError: the script's own"), why
    assert [line.split(".")[0] for line in said.splitlines()] == [
        "The other ranks take part in generate, batch_generate, stream_generate and Conversation, not in a call of the "
        "model",
        "These ranks share a model already, and follow this one",
        "prompt_cache holds one rank's share of a state",
        "Weights were changed on rank 0 alone",
    ]
    assert (nothing, [one.returncode for one in started]) == ("", [1, 1])
    assert "Error" not in quiet
