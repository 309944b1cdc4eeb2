"""A conversion leaves a complete folder or none."""

import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError, safe_open

from mlx_qwen.convert import convert
from mlx_qwen.convert.work import write as weights
from mlx_qwen.convert.writing import staging, writer
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory
from tests.support.mlx_folders import digests


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def failing_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException, int], None]:
    """`failing_after(error, n)`: the n-th piece of every later conversion raises `error`."""

    def install(error: BaseException, n: int) -> None:
        produce, calls = weights.produce, iter(range(1, 1_000_000))

        def failing(piece: weights.Piece, *how: object) -> object:
            if next(calls) >= n:
                raise error
            return produce(piece, *how)

        monkeypatch.setattr(weights, "produce", failing)

    return install


@pytest.mark.parametrize("n", [1, 20])
def test_a_conversion_that_cannot_succeed_leaves_nothing(
    n: int, checkpoint: CheckpointFactory, tmp_path: Path, failing_after: Callable[[BaseException, int], None]
) -> None:
    failing_after(ValueError("broken"), n)
    with pytest.raises(ValueError, match="broken"):
        convert(checkpoint("moe"), tmp_path / "out")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_an_interrupted_conversion_leaves_is_no_model(
    error: BaseException,
    n: int,
    checkpoint: CheckpointFactory,
    tmp_path: Path,
    failing_after: Callable[[BaseException, int], None],
) -> None:
    failing_after(error, n)
    with pytest.raises((KeyboardInterrupt, ConversionError)):
        convert(checkpoint("moe"), tmp_path / "out")
    assert left_in(tmp_path) == ["out.partial"]
    assert not list(tmp_path.rglob("config.json"))
    for file in tmp_path.rglob("*.safetensors"):
        with pytest.raises(SafetensorError):
            safe_open(file, framework="numpy")


def test_no_thread_works_on_after_an_interruption(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    produce, begun, ended = weights.produce, [], []

    def slow(piece: weights.Piece, *how: object) -> object:
        begun.append(piece)
        time.sleep(0.02)
        ended.append(piece)
        return produce(piece, *how)

    def interrupt(line: object, nbytes: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "produce", slow)
    monkeypatch.setattr(weights.Progress, "advance", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("moe"), tmp_path / "out", recipe="mixed-4-8")
    assert 0 < len(begun) == len(ended) < 20


def test_no_folder_with_a_config_exists_before_the_weights_are_complete(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    produce = weights.produce

    def looking(piece: weights.Piece, *how: object) -> object:
        seen.append(any(tmp_path.rglob("config.json")) or (tmp_path / "out").exists())
        return produce(piece, *how)

    monkeypatch.setattr(weights, "produce", looking)
    convert(checkpoint("dense"), tmp_path / "out")
    assert seen and not any(seen)


def test_an_existing_target_is_refused(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    before = digests(tmp_path / "out")
    with pytest.raises(ConversionError, match="--overwrite"):
        convert(checkpoint("dense"), tmp_path / "out", bits=8)
    assert digests(tmp_path / "out") == before


def test_overwriting_replaces_the_whole_folder(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    convert(checkpoint("dense", dtype="bfloat16"), tmp_path / "out")
    convert(checkpoint("dense"), tmp_path / "out", bits=8, overwrite=True)
    convert(checkpoint("dense"), tmp_path / "fresh", bits=8)
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")
    assert left_in(tmp_path) == ["fresh", "out"]


def test_a_failed_overwrite_keeps_the_old_folder(
    checkpoint: CheckpointFactory, tmp_path: Path, failing_after: Callable[[BaseException, int], None]
) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    before = digests(tmp_path / "out")
    failing_after(OSError(errno.ENOSPC, "No space left on device"), 5)
    with pytest.raises(ConversionError, match="disk is full"):
        convert(checkpoint("dense"), tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == before
    assert left_in(tmp_path) == ["out", "out.partial"]


def test_a_swap_that_fails_puts_the_old_folder_back(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint("dense"), tmp_path / "out")
    before, rename = digests(tmp_path / "out"), Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.parent.name == "out.partial" and path.name == "model":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ConversionError, match="Input/output error"):
        convert(checkpoint("dense"), tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out") == before
    assert left_in(tmp_path) == ["out", "out.partial"]


def test_overwriting_never_removes_what_is_no_model(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="no model folder"):
        convert(checkpoint("dense"), tmp_path / "documents", overwrite=True)
    assert left_in(tmp_path / "documents") == ["thesis.txt"]


@pytest.mark.parametrize("below", ["", "inner"])
def test_overwriting_never_removes_the_source(below: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    target = tmp_path / "model"
    source = shutil.copytree(checkpoint("dense"), target / below)
    (target / "config.json").touch()
    with pytest.raises(ConversionError, match="holds the source"):
        convert(source, target, overwrite=True)
    assert (source / "model.safetensors").is_file()


def test_the_source_is_found_under_another_name_too(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As "Model" and "model" are the same on a disk that ignores case, which no path tells.
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    (tmp_path / "alias").symlink_to(source)
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    for target in (tmp_path / "alias", source):
        with pytest.raises(ConversionError, match="holds the source"):
            staging.check_apart(target, source)
    staging.check_apart(tmp_path / "another", source)


@pytest.mark.parametrize(("inner", "name"), [("", "."), ("", "../model"), ("inner", "..")])
def test_the_present_folder_is_not_replaced(
    inner: str, name: str, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = shutil.copytree(checkpoint("dense"), tmp_path / "model")
    (target / inner).mkdir(exist_ok=True)
    before = contents(target)
    monkeypatch.chdir(target / inner)
    with pytest.raises(ConversionError, match="holds the folder that you are in"):
        convert(checkpoint("dense"), name, overwrite=True)
    assert contents(target) == before
    assert left_in(tmp_path) == ["model"]


def test_a_full_disk_is_found_before_anything_is_written(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(staging, "staged", pytest.fail)
    with pytest.raises(ConversionError, match=r"needs 0\.\d MB, but only 0\.0 MB are free"):
        convert(checkpoint("dense"), tmp_path / "deep" / "out")
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_is_one_clear_error(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, room = os.pwrite, [200_000]

    def limited(descriptor: int, data: memoryview, position: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(writer.os, "pwrite", limited)
    with pytest.raises(ConversionError, match=r"The disk is full.*the same command goes on"):
        convert(checkpoint("moe"), tmp_path / "out")
    assert not list(tmp_path.rglob("config.json"))


def test_a_folder_that_nobody_may_write_to_is_one_clear_error(
    checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_only = Path("/System" if sys.platform == "darwin" else "/sys")  # for the super-user too
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConversionError, match="Choose an --mlx-path in a folder that you may write to; nothing was"):
        convert(checkpoint("dense"), read_only / "out")


def test_a_write_that_takes_only_part_of_the_data_is_continued(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(checkpoint("dense"), tmp_path / "whole")
    pwrite = os.pwrite
    monkeypatch.setattr(writer.os, "pwrite", lambda descriptor, data, at: pwrite(descriptor, data[:1000], at))
    convert(checkpoint("dense"), tmp_path / "parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_a_target_below_a_file_is_one_clear_error(checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConversionError, match="Choose an --mlx-path in a folder that you may write to"):
        convert(checkpoint("dense"), tmp_path / "file" / "out")
    assert left_in(tmp_path) == ["file"]


def test_a_tensor_that_was_not_written_whole_is_never_passed_off(tmp_path: Path) -> None:
    entries = [writer.Entry("a", "F32", (4, 4))]
    with (
        writer.SafetensorsWriter(tmp_path, "model", entries) as files,
        pytest.raises(RuntimeError, match="before a was complete"),
    ):
        files.finish()


@pytest.fixture(autouse=True)
def no_open_files_left() -> Iterator[None]:
    """However a conversion ends, it closes its files."""
    open_files = Path("/proc/self/fd")
    before = len(list(open_files.iterdir())) if open_files.exists() else 0
    yield
    after = len(list(open_files.iterdir())) if open_files.exists() else 0
    assert after <= before
