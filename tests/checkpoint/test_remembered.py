"""What was found out once is kept, and a cache folder in any state never stops anything."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from mlx_qwen.remembered import recall, remember


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mlx-qwen"


def test_what_is_remembered_is_recalled_by_its_name_alone(cache: Path) -> None:
    assert remember("mtp/a", {"reads": "normed", "tokens": 5})
    assert recall("mtp/a") == {"reads": "normed", "tokens": 5}
    assert recall("mtp/b") == recall("a") == {}
    assert [file.name for file in (cache / "mtp").iterdir()] == ["a.json"]
    assert remember("mtp/a", {"reads": "residual"})
    assert recall("mtp/a") == {"reads": "residual"}


@pytest.mark.parametrize("damage", [b"", b'{"reads": "nor', b"[1, 2]", b"\xff\xfe\x00", b"[" * 200_000])
def test_a_damaged_file_counts_as_none_and_is_replaced(cache: Path, damage: bytes) -> None:
    remember("a", {"x": 1})
    (cache / "a.json").write_bytes(damage)
    assert recall("a") == {}
    assert remember("a", {"x": 2}) and recall("a") == {"x": 2}


def test_a_folder_in_the_place_of_the_file_or_a_file_in_that_of_the_folder_is_no_error(cache: Path) -> None:
    (cache / "a.json").mkdir(parents=True)
    assert recall("a") == {} and not remember("a", {"x": 1})
    assert [file.name for file in cache.iterdir()] == ["a.json"]
    (cache / "b").write_text("no folder")
    assert recall("b/c") == {} and not remember("b/c", {"x": 1})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_no_error(cache: Path) -> None:
    cache.mkdir()
    cache.chmod(0o500)
    assert not remember("a", {"x": 1}) and recall("a") == {}


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert recall("a") == {} and not remember("a", {"x": 1})


def test_a_relative_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert remember("a", {"x": 1})
    assert json.loads((tmp_path / "home" / ".cache" / "mlx-qwen" / "a.json").read_text()) == {"x": 1}


def _write_often(value: int) -> None:
    for _ in range(100):
        assert remember("a", {"value": value, "padding": "." * 5000})


def test_readers_never_see_half_of_what_several_processes_write(cache: Path) -> None:
    remember("a", {"value": 0, "padding": "." * 5000})
    writers = [get_context("spawn").Process(target=_write_often, args=(i,)) for i in range(3)]
    for writer in writers:
        writer.start()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(lambda: [writer.join() for writer in writers])
        while not done.done():
            assert len(str(recall("a")["padding"])) == 5000
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert [file.name for file in cache.iterdir()] == ["a.json"]
