"""What a journal says is believed only while the files are there that it speaks of."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_qwen.convert import convert
from mlx_qwen.convert.writing import room
from mlx_qwen.convert.writing.room import check_space
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.conftest import Interrupt
from tests.support.mlx_folders import digests


def cut(file: Path) -> None:
    os.truncate(file, 300_000)


def cut_by_one_byte(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        (Path.unlink, "model.safetensors"),
        (Path.unlink, "mlx-qwen.safetensors"),
        (cut, "model.safetensors"),
        (cut_by_one_byte, "mlx-qwen.safetensors"),
        (empty, "model.safetensors"),
        (zero, "model.safetensors"),
    ],
)
def test_weight_files_that_were_lost_are_written_again(
    harm: Callable[[Path], None], name: str, checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    source = checkpoint("moe", with_mtp=True, dtype="bfloat16")
    convert(source, tmp_path / "whole")
    interrupt_after(60)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    harm(tmp_path / "out.partial" / "model" / name)
    interrupt_after(0)
    with pytest.warns(UserWarning, match=r"weight files .* are gone, or are not as they were left\. .* afresh") as said:
        convert(source, tmp_path / "out")
    assert len(said) == 1
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_what_is_found_lost_once_more_is_no_model_meanwhile(
    checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    interrupt_after(60)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("moe"), tmp_path / "out")
    model = tmp_path / "out.partial" / "model"
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").unlink()
    interrupt_after(1)
    with pytest.warns(UserWarning, match="afresh"), pytest.raises(KeyboardInterrupt):
        convert(checkpoint("moe"), tmp_path / "out")
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]
    interrupt_after(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(checkpoint("moe"), tmp_path / "out")


def test_holes_in_an_unfinished_file_are_not_taken_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = tmp_path / "out.partial" / "model" / "model.safetensors"
    unfinished.parent.mkdir(parents=True)
    unfinished.write_bytes(bytes(1 << 20))
    os.truncate(unfinished, 1 << 30)
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "out", 2 << 20)
    with pytest.raises(ConversionError, match=r"only 2\.1 MB are free"):
        check_space(tmp_path / "out", 3 << 20)
