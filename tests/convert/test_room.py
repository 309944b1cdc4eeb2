"""Whether a conversion of a Hub repository can end well is found out before its weights are downloaded."""

import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_qwen.convert import convert, describe, job
from mlx_qwen.convert.measures import readable_size
from mlx_qwen.convert.writing import room
from mlx_qwen.errors import CheckpointError, ConversionError, MLXQwenError
from tests.conftest import CheckpointFactory
from tests.support.hub import REPOSITORY, MakeHub
from tests.support.mlx_folders import digests
from tests.support.tokenizers import add_tokenizer

Free = Callable[[dict[str, int]], None]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Free:
    """`free({name: bytes})`: what is free where a path has that name in it, the first that fits; "" fits all."""
    usage = namedtuple("usage", ["total", "used", "free"])

    def install(sizes: dict[str, int]) -> None:
        def of(path: Path) -> object:
            return usage(1 << 50, 0, next(nbytes for name, nbytes in sizes.items() if name in str(path)))

        monkeypatch.setattr(room.shutil, "disk_usage", of)

    return install


def shard_bytes(folder: Path) -> list[int]:
    """Bytes of every shard below `folder`, links not counted, from small to large."""
    return sorted(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize("settings", [{}, {"target_size": "100MB"}, {"dtype": "auto", "chip": "M2"}, {"bits": 8}])
def test_room_for_output_and_download_is_checked_before_the_download(
    settings: dict[str, object], sharded: Path, tmp_path: Path, hub: MakeHub, free: Free
) -> None:
    fake = hub(sharded)
    free({"": sum(shard_bytes(sharded)) + 1000})
    with pytest.raises(ConversionError, match=r"The output needs \d\.\d MB and the download \d\.\d MB, but only"):
        convert(REPOSITORY, tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert shard_bytes(tmp_path / "cache") == []
    assert fake.served_weights() < sum(shard_bytes(sharded)) / 4
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's word on the small files
@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [({"cache": 1000, "": 1 << 40}, "The download needs"), ({"cache": 1 << 40, "": 1000}, "The output needs")],
)
def test_two_disks_are_checked_each(
    sizes: dict[str, int],
    complaint: str,
    sharded: Path,
    tmp_path: Path,
    hub: MakeHub,
    free: Free,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(sharded)
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(room, "_on_one_disk", lambda a, b: False)
    free(sizes)
    with pytest.raises(ConversionError, match=complaint):
        convert(REPOSITORY, tmp_path / "out")
    assert shard_bytes(tmp_path / "cache") == []


def test_what_the_cache_holds_needs_no_room(sharded: Path, tmp_path: Path, hub: MakeHub, free: Free) -> None:
    hub(sharded)
    disk = convert(REPOSITORY, tmp_path / "first").description.disk
    free({"": disk})
    convert(REPOSITORY, tmp_path / "second")
    free({"": disk - 1})
    with pytest.raises(ConversionError, match=r"The output needs \d\.\d MB, but only"):
        convert(REPOSITORY, tmp_path / "third")


def test_a_target_that_cannot_be_written_is_found_before_the_download(sharded: Path, hub: MakeHub, free: Free) -> None:
    fake = hub(sharded)
    free({"": 1 << 40})
    read_only = Path("/System" if sys.platform == "darwin" else "/sys")  # for the super-user too
    with pytest.raises(ConversionError, match="Choose an --mlx-path in a folder that you may write to"):
        convert(REPOSITORY, read_only / "out")
    assert fake.served == {}


def test_a_repository_that_cannot_be_converted_is_found_before_the_download(
    checkpoint: CheckpointFactory, tmp_path: Path, hub: MakeHub
) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")
    (source / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + bytes(100_000))
    fake = hub(source)
    with pytest.raises(CheckpointError, match="of someone/tiny cannot be read as safetensors"):
        convert(REPOSITORY, tmp_path / "out")
    assert fake.served_weights() < 10_000


@pytest.mark.parametrize(("has_tokenizer", "complaint"), [(False, "has no tokenizer.json"), (True, "0 tokens")])
def test_that_verifying_is_impossible_is_found_before_the_download(
    has_tokenizer: bool, complaint: str, sharded: Path, tmp_path: Path, hub: MakeHub
) -> None:
    source = shutil.copytree(sharded, tmp_path / "source")
    fake = hub(add_tokenizer(source) if has_tokenizer else source)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(MLXQwenError, match=complaint):
        convert(REPOSITORY, tmp_path / "out", verify=True, verify_text=tmp_path / "empty.txt")
    assert fake.served_weights() < sum(shard_bytes(sharded)) / 4


def test_a_dry_run_tells_what_the_download_takes(sharded: Path, tmp_path: Path, hub: MakeHub) -> None:
    hub(sharded)
    sizes = shard_bytes(sharded)
    found = convert(REPOSITORY, tmp_path / "out", dry_run=True).description
    assert found.download == describe(REPOSITORY).download == sum(sizes)
    assert f"{readable_size(found.disk)} of disk for the output and 1.6 MB for the download" in found.table()
    streamed = convert(REPOSITORY, tmp_path / "out", dry_run=True, stream_from_hub=True).description
    assert streamed.download == sum(sizes[-2:])
    convert(REPOSITORY, tmp_path / "out")
    found = convert(REPOSITORY, tmp_path / "again", dry_run=True).description
    assert found.download == 0 == describe(sharded).download
    assert "for the download" not in found.table()


def test_what_is_in_the_cache_is_converted_while_the_hub_is_down(
    sharded: Path, tmp_path: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(sharded)
    convert(REPOSITORY, tmp_path / "first")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    convert(REPOSITORY, tmp_path / "second")
    assert (tmp_path / "second" / "config.json").is_file()


@pytest.mark.parametrize("settings", [{}, {"target_size": "700kB", "dtype": "auto", "chip": "M2"}])
def test_a_repository_that_is_yet_to_come_is_planned_once_and_by_its_values(
    settings: dict[str, object], sharded: Path, tmp_path: Path, hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(sharded, tmp_path / "local", **settings)  # type: ignore[arg-type]
    hub(sharded)
    plan, planned = job.plan_checkpoint, []

    def counting(*what: object) -> object:
        planned.append(what)
        return plan(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "plan_checkpoint", counting)
    convert(REPOSITORY, tmp_path / "hub", **settings)  # type: ignore[arg-type]
    assert len(planned) == 1
    written = [digests(tmp_path / name) for name in ("hub", "local")]
    for files in written:
        files.pop("README.md")  # which names the source
    assert written[0] == written[1]
