"""A conversion that ended early is gone on with, and nobody can tell from its output."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from torch import Tensor

from mlx_qwen.checkpoint.released import reduced
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.convert.work import write as weights
from mlx_qwen.convert.writing.journal import Journal, Record, locked
from mlx_qwen.convert.writing.staging import staged
from mlx_qwen.errors import CheckpointError, ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.conftest import Interrupt
from tests.support.foreign import edit_tensors, foreign_checkpoint
from tests.support.integer_codes import symmetric_gptq
from tests.support.mlx_folders import digests
from tools.benchmarks.synthetic import write_random_checkpoint

KILLS = 20


def large_config() -> ModelConfig:
    """80 MB: large enough to be killed in the middle of its pieces."""
    return reduced("0.8B", num_layers=1, changes={"vocab_size": 16384})


def convert_to(source: Path, target: Path) -> None:
    """What the killed processes run: bits by name, so that kills find it writing, and progress recorded more often."""
    weights.RECORD_BYTES = 4 << 20
    convert(source, target, recipe="mixed-4-8", quantizer="rtn", progress=False)


def test_killed_twenty_times_and_resumed_it_writes_the_same_bytes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "killed"
    write_random_checkpoint(large_config(), source)
    convert_to(source, tmp_path / "whole")
    expected = digests(tmp_path / "whole")
    # Processes that start with everything imported, so that kills find them at work.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_qwen.convert", __name__])
    duration, moments = seconds_of(context, source, tmp_path / "timed"), random.Random(0)
    kills, recorded = 0, set()
    while kills < KILLS:
        if target.exists():
            assert digests(target) == expected
            shutil.rmtree(target)
        process = context.Process(target=convert_to, args=(source, target))
        process.start()
        process.join(moments.uniform(0, 0.6 * duration))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        recorded.add(pieces_recorded(target))
        unfinished = tmp_path / "killed.partial" / "model"
        assert not (unfinished / "config.json").exists() or digests(unfinished) == expected
    if not target.exists():
        convert_to(source, target)
    assert digests(target) == expected
    assert len(recorded) > 2, "too few were killed while they wrote"


def seconds_of(context: ForkServerContext, source: Path, target: Path) -> float:
    """How long one conversion takes in a process of its own, once such processes start quickly."""
    seconds = 0.0
    for run in ("first", "second"):
        started = time.perf_counter()
        process = context.Process(target=convert_to, args=(source, target.with_name(run)))
        process.start()
        process.join()
        seconds = time.perf_counter() - started
    return seconds


@pytest.mark.parametrize("n", [1, 7, 30])
def test_what_is_recorded_is_not_read_again(
    n: int,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
    interrupt_after: Interrupt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = checkpoint("moe", with_mtp=True, dtype="bfloat16")
    convert(source, tmp_path / "whole")
    interrupt_after(n)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert pieces_recorded(tmp_path / "out") == n
    read, produce = [], weights.produce

    def counting(piece: weights.Piece, *how: object) -> object:
        read.append(piece)
        return produce(piece, *how)

    monkeypatch.setattr(weights, "produce", counting)
    interrupt_after(0)
    convert(source, tmp_path / "out")
    resumed = len(read)
    convert(source, tmp_path / "again")
    assert len(read) - resumed == resumed + n
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_remarks_on_tensors_survive_an_interruption(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.embed_tokens.weight"][3, 5] = 1e5

    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    edit_tensors(source, spoil)
    interrupt_after(20)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", quantize=False, dtype="float16")
    interrupt_after(0)
    with pytest.warns(UserWarning, match="too narrow"):
        report = convert(source, tmp_path / "out", quantize=False, dtype="float16")
    assert report.non_finite == ("language_model.model.embed_tokens.weight",)


def test_other_settings_start_afresh_and_say_so(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    interrupt_after(5)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("dense"), tmp_path / "out", bits=8)
    interrupt_after(0)
    with pytest.warns(UserWarning, match="starts afresh"):
        convert(checkpoint("dense"), tmp_path / "out", bits=4)
    convert(checkpoint("dense"), tmp_path / "fresh", bits=4)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_source_that_changed_starts_afresh(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    interrupt_after(5)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    shutil.rmtree(source)
    shutil.copytree(checkpoint("dense", seed=1), source)
    interrupt_after(0)
    with pytest.warns(UserWarning, match="starts afresh"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


@pytest.mark.parametrize("way", ["replaced", "in place"])
def test_a_source_that_changed_with_its_size_and_time_kept_starts_afresh(
    way: str, checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    file = source / "model.safetensors"
    interrupt_after(20)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    before, data = file.stat(), bytearray(file.read_bytes())
    data[-64:] = bytes(64)
    if way == "replaced":
        file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    interrupt_after(0)
    with pytest.warns(UserWarning, match="afresh"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "expected")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")


def test_without_resuming_nothing_is_said_and_everything_read(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    interrupt_after(5)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("dense"), tmp_path / "out", bits=8)
    (tmp_path / "out.partial" / "model" / "stray.txt").touch()
    interrupt_after(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(checkpoint("dense"), tmp_path / "out", bits=4, resume=False)
    assert "stray.txt" not in digests(tmp_path / "out")


def test_an_interrupted_overwrite_keeps_the_old_folder_until_it_is_resumed(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    before = digests(tmp_path / "out")
    interrupt_after(5)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("dense"), tmp_path / "out", bits=8, overwrite=True)
    assert digests(tmp_path / "out") == before
    interrupt_after(0)
    convert(checkpoint("dense"), tmp_path / "out", bits=8, overwrite=True)
    convert(checkpoint("dense"), tmp_path / "fresh", bits=8)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def test_a_model_whose_replacement_was_cut_off_comes_back(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    before = digests(tmp_path / "out")
    with suppress(KeyboardInterrupt), staged(tmp_path / "out", "any", overwrite=True):
        raise KeyboardInterrupt
    (tmp_path / "out").rename(tmp_path / "out.partial" / "replaced")
    with staged(tmp_path / "out", "any", overwrite=True):
        assert digests(tmp_path / "out") == before


def test_a_folder_that_another_process_made_meanwhile_is_not_replaced(
    checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    def made_meanwhile(description: object) -> None:
        (tmp_path / "out").mkdir()

    with pytest.raises(ConversionError, match="exists"):
        convert(checkpoint("dense"), tmp_path / "out", announce=made_meanwhile)
    assert list((tmp_path / "out").iterdir()) == []


def test_two_conversions_into_one_folder_are_kept_apart(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with (
        locked(tmp_path / "out.partial" / "journal"),
        pytest.raises(ConversionError, match="Another process is converting into"),
    ):
        convert(checkpoint("dense"), tmp_path / "out")
    convert(checkpoint("dense"), tmp_path / "out")


def test_a_line_that_was_cut_off_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with locked(path) as descriptor:
        journal = Journal(descriptor, "work", resume=True)
        journal.begin()
        journal.commit(Record(7, ("a",), ("b",)))
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1])):
        path.write_bytes(whole + whole.splitlines()[1][:cut])
        with locked(path) as descriptor:
            journal = Journal(descriptor, "work", resume=True)
            assert (journal.found, journal.last) == (True, Record(7, ("a",), ("b",)))
            journal.commit(Record(8))
        with locked(path) as descriptor:
            assert Journal(descriptor, "work", resume=True).last == Record(8)


def pieces_recorded(target: Path) -> int:
    """How many pieces the journal beside `target` knows."""
    journal = target.with_name(f"{target.name}.partial") / "journal"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return max((json.loads(line).get("pieces", 0) for line in lines if line.endswith("}")), default=0)


def vanish(file: Path) -> None:
    file.unlink(missing_ok=True)


def shrink(file: Path) -> None:
    os.truncate(file, min(file.stat().st_size, 20_000))


@pytest.mark.parametrize("kind", ["plain", "gptq"])
@pytest.mark.parametrize(
    ("harm", "words"), [(vanish, "can no longer be read.*Put it back"), (shrink, "The file is truncated: download it")]
)
def test_a_source_that_goes_midway_is_no_fault_of_the_target(
    kind: str,
    harm: Callable[[Path], None],
    words: str,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    if kind == "gptq":
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
        source, _ = foreign_checkpoint(source, tmp_path / "made", settings, symmetric_gptq)
    produce = weights.produce

    def harming(piece: weights.Piece, *how: object) -> object:
        harm(source / "model.safetensors")
        return produce(piece, *how)

    monkeypatch.setattr(weights, "produce", harming)
    with pytest.raises(CheckpointError, match=rf"{source.name}/model\.safetensors .*{words}"):
        convert(source, tmp_path / "out", recipe="mixed-4-8")


def test_a_tokenizer_that_vanishes_midway_is_no_fault_of_the_target(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, produce = shutil.copytree(chat_folder, tmp_path / "source"), weights.produce

    def removing(piece: weights.Piece, *how: object) -> object:
        (source / "tokenizer.json").unlink(missing_ok=True)
        return produce(piece, *how)

    monkeypatch.setattr(weights, "produce", removing)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can no longer be read.*the same command then goes on"):
        convert(source, tmp_path / "out", recipe="mixed-4-8")
    assert pieces_recorded(tmp_path / "out") > 0
