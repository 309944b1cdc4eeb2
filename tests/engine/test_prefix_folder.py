"""A folder of what was read before: the next run goes on from it, and no answer is another one for it."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import mlx.core as mx
import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.engine import sealed
from mlx_qwen.engine.engine import engine_of
from mlx_qwen.errors import PromptError
from mlx_qwen.generation import generate, stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from tests.engine.conftest import Loaded, make_processor

Checkpoint = Callable[..., Path]
PROMPT = [(7 * i) % 280 + 3 for i in range(90)]
ROOT = Path(__file__).resolve().parents[2]


def asked(model: Model, processor: Processor, prompt: list[int], folder: Path | None, **more: object) -> list[int]:
    """The tokens of an answer, and how many of the prompt's were not computed."""
    options = {"temperature": 0, "max_tokens": 10, "prefix_cache_dir": folder, **more}
    responses = list(stream_generate(model, processor, prompt, **options))  # type: ignore[arg-type]
    assert len({response.cached_tokens for response in responses}) == 1
    return [*(response.token for response in responses), responses[-1].cached_tokens]


def written(model: Model, folder: Path) -> None:
    """All that an engine has kept is on the disk, and the engine is forgotten, as at the end of a process."""
    engine_of(model).store.folder(folder).close()
    model.engine = None


def fresh(model: Model, processor: Processor, prompt: list[int], **more: object) -> list[int]:
    model.engine = None
    return asked(model, processor, prompt, None, prefix_cache=False, **more)[:-1]


@pytest.mark.parametrize(
    ("kind", "with_mtp", "how"),
    [
        ("dense", False, {}),
        ("moe", True, {"mtp": "auto"}),
        ("dense", True, {"mtp": 0}),
        ("dense", True, {"mtp": 3, "kv_bits": 8}),
        ("dense", True, {"temperature": 1.0, "seed": 5, "presence_penalty": 1.0}),
    ],
    ids=["plain", "moe-auto", "no-drafts", "packed", "drawn"],
)
def test_the_next_run_goes_on_from_every_anchor(
    checkpoint: Checkpoint, tmp_path: Path, kind: str, with_mtp: bool, how: dict[str, object]
) -> None:
    path = checkpoint(kind, with_mtp=with_mtp)
    model, processor = load_model(path, ModelConfig.from_directory(path)), make_processor()
    first = asked(model, processor, PROMPT, tmp_path, **how)
    written(model, tmp_path)
    # A prompt without messages is kept 64 tokens before its end, at its end, and behind the answer.
    answered = [*PROMPT, *first[:-1]]
    for prompt, least in (([*PROMPT[:60], 5, 6], 26), ([*PROMPT, 5], 90), ([*answered, 5, 6], 99), (PROMPT, 90)):
        expected = fresh(model, processor, prompt, **how)
        model.engine = None
        assert asked(model, processor, prompt, tmp_path, **how) == [*expected, least]
        model.engine = None


def test_memory_comes_first_and_the_disk_where_it_knows_more(loaded: Loaded, tmp_path: Path) -> None:
    asked(*loaded[:2], PROMPT, tmp_path)
    written(loaded.model, tmp_path)
    asked(*loaded[:2], [*PROMPT[:30], 7], None)
    read = []
    files = engine_of(loaded.model).store.folder(tmp_path)
    original = files.take
    files.take = lambda *args, **how: read.append(how) or original(*args, **how)  # type: ignore[method-assign,func-returns-value]
    assert asked(*loaded[:2], [*PROMPT, 9], tmp_path)[-1] == 90
    assert asked(*loaded[:2], PROMPT, tmp_path)[-1] == 90
    assert len(read) == 1


@pytest.mark.parametrize("on_disk", [True, False], ids=["disk", "memory"])
def test_each_packing_finds_only_its_own(loaded: Loaded, tmp_path: Path, on_disk: bool) -> None:
    model, processor = loaded[:2]
    expected = {bits: fresh(model, processor, PROMPT, kv_bits=bits) for bits in (8, None, 4)}
    folder = tmp_path if on_disk else None
    model.engine = None
    for bits in (8, None):
        assert asked(model, processor, PROMPT, folder, kv_bits=bits) == [*expected[bits], 0]
    if on_disk:
        written(model, tmp_path)
    for bits, cached in ((None, 90), (4, 0), (8, 90)):
        assert asked(model, processor, PROMPT, folder, kv_bits=bits) == [*expected[bits], cached]


def test_another_models_folder_is_not_used(checkpoint: Checkpoint, loaded: Loaded, tmp_path: Path) -> None:
    asked(*loaded[:2], PROMPT, tmp_path)
    written(loaded.model, tmp_path)
    other = tmp_path / "copy"
    shutil.copytree(loaded.folder, other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    for folder, dtype in ((other, None), (loaded.folder, mx.bfloat16), (loaded.folder, None)):
        model = load_model(folder, ModelConfig.from_directory(folder), dtype=dtype)
        same = folder is loaded.folder and dtype is None
        assert asked(model, loaded.processor, PROMPT, tmp_path)[-1] == (90 if same else 0)
        written(model, tmp_path)


def test_a_model_that_nothing_tells_from_others_keeps_nothing_on_the_disk(loaded: Loaded, tmp_path: Path) -> None:
    model = load_model(loaded.folder, ModelConfig.from_directory(loaded.folder))
    model.update({"embed_tokens": {"weight": model.embed_tokens.weight * 2}})
    with pytest.raises(PromptError, match="prefix_cache_dir needs a model whose weights are those of a folder"):
        generate(model, loaded.processor, PROMPT, prefix_cache_dir=tmp_path, max_tokens=2)


def test_a_folder_that_cannot_be_used_is_said_at_once(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(PromptError, match=r"prefix_cache_dir .*file/below cannot be used"):
        stream_generate(*loaded[:2], PROMPT, prefix_cache_dir=tmp_path / "file" / "below")


def test_a_damaged_folder_costs_a_warning_and_no_answer(loaded: Loaded, tmp_path: Path) -> None:
    first = asked(*loaded[:2], PROMPT, tmp_path)
    written(loaded.model, tmp_path)
    random = Random(0)
    for path in tmp_path.glob("v1-*"):
        content = bytearray(path.read_bytes())
        content[random.randrange(len(content))] ^= 1
        path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="Damaged files in .* are removed") as warned:
        assert asked(*loaded[:2], PROMPT, tmp_path) == first
    assert len(warned) == 1
    written(loaded.model, tmp_path)
    assert asked(*loaded[:2], PROMPT, tmp_path) == [*first[:-1], 90]


def test_a_full_disk_costs_a_warning_and_no_answer(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fresh(*loaded[:2], PROMPT)
    loaded.model.engine = None

    def full(path: Path, chunks: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning, match="No space left on device") as warned:
        patch.setattr(sealed, "write_whole", full)
        for _ in range(3):
            assert asked(*loaded[:2], PROMPT, tmp_path)[:-1] == expected
        written(loaded.model, tmp_path)
    assert len(warned) == 1
    assert asked(*loaded[:2], PROMPT, tmp_path) == [*expected, 0]


def test_no_answer_waits_for_the_disk(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free, original = threading.Event(), sealed.write_whole

    def slow(path: Path, chunks: object) -> None:
        assert free.wait(60)
        original(path, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(sealed, "write_whole", slow)
    started = time.perf_counter()
    for first in range(5, 10):
        assert len(asked(*loaded[:2], [first, *PROMPT], tmp_path, max_tokens=60)) == 61
    assert time.perf_counter() - started < 50
    assert not list(tmp_path.glob("v1-*"))
    free.set()
    written(loaded.model, tmp_path)
    assert asked(*loaded[:2], [9, *PROMPT], tmp_path)[-1] == 91


def test_the_folder_stays_within_its_budget(loaded: Loaded, tmp_path: Path) -> None:
    asked(*loaded[:2], PROMPT, tmp_path / "one")
    written(loaded.model, tmp_path / "one")
    limit = 2 * sum(file.stat().st_size for file in (tmp_path / "one").iterdir())
    for first in range(5, 15):
        asked(*loaded[:2], [first, *PROMPT], tmp_path / "all", prefix_cache_dir_bytes=limit)
        engine_of(loaded.model).store.folder(tmp_path / "all").flush()
        assert sum(file.stat().st_size for file in (tmp_path / "all").iterdir()) <= limit
    written(loaded.model, tmp_path / "all")
    assert asked(*loaded[:2], [14, *PROMPT], tmp_path / "all")[-1] == 91
    assert asked(*loaded[:2], [5, *PROMPT], tmp_path / "all")[-1] == 0


def test_the_memory_that_prefixes_may_take_can_be_chosen(loaded: Loaded) -> None:
    asked(*loaded[:2], PROMPT, None, prefix_cache_bytes=0)
    assert asked(*loaded[:2], PROMPT, None, prefix_cache_bytes=1 << 30)[-1] == 0
    assert asked(*loaded[:2], PROMPT, None)[-1] == 90
    assert asked(*loaded[:2], PROMPT, None, prefix_cache_bytes=0)[-1] == 90
    assert asked(*loaded[:2], PROMPT, None, prefix_cache_bytes=0)[-1] == 0


PROGRAM = """
import sys
import mlx_qwen
model, processor = mlx_qwen.load()
print("begun", flush=True)
for number in range(int(sys.argv[2])):
    prompt = [(7 * i) % 280 + 3 for i in range(90)] + [number % 3 + 3] * (number % 5)
    last = list(mlx_qwen.stream_generate(model, processor, prompt, temperature=0, max_tokens=6,
                                         prefix_cache_dir=sys.argv[1], seed=1))
    print(last[-1].cached_tokens, [r.token for r in last], flush=True)
"""


def program(folder: Path, requests: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, str(folder), str(requests)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def said(process: "subprocess.Popen[str]") -> list[str]:
    output = process.communicate(timeout=120)[0].splitlines()
    assert output[0] == "begun"
    return output[1:]


def test_what_a_program_read_is_there_when_it_has_ended_and_two_may_share_it(tmp_path: Path) -> None:
    first = said(program(tmp_path, 1))
    assert first[0].startswith("0 ")
    both = [said(process) for process in [program(tmp_path, 4), program(tmp_path, 4)]]
    assert [lines[0] for lines in both] == ["90 " + first[0].removeprefix("0 ")] * 2
    answers = [[line.partition(" ")[2] for line in lines] for lines in both]
    assert answers[0] == answers[1]


def test_killed_at_any_moment_the_next_run_is_right(tmp_path: Path) -> None:
    random = Random(1)
    expected = [line.partition(" ")[2] for line in said(program(tmp_path / "whole", 8))]
    for _ in range(3):
        process = program(tmp_path / "killed", 10_000)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for _ in range(random.randrange(10, 60)):
            process.stdout.readline()
        time.sleep(random.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    again = said(program(tmp_path / "killed", 8))
    assert [line.partition(" ")[2] for line in again] == expected
    assert int(again[0].split()[0]) >= 26
    assert not list((tmp_path / "whole").glob(".*"))
