"""The folder of an unfinished conversion: nobody's files are lost with it, whenever a conversion ends."""

import errno
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from mlx_qwen.convert import convert
from mlx_qwen.convert.writing import journal
from mlx_qwen.convert.writing.journal import Journal, Record, locked
from mlx_qwen.convert.writing.staging import advice, check_workspace, staged
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory
from tests.convert.conftest import Interrupt
from tests.support.mlx_folders import digests

FILE_OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
NAMES = ("config.json", "tokenizer.json")


def a_folder_with(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("" if name == "journal" else "years of work\n")

    return make


def a_diary(path: Path) -> None:
    path.mkdir()
    (path / "journal").write_text("Dear diary,\ntoday")


def a_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    a_folder_with("thesis.txt")(elsewhere)
    path.symlink_to(elsewhere)


def a_journal_that_is_a_link(path: Path) -> None:
    path.mkdir()
    elsewhere = path.with_name("elsewhere")
    elsewhere.write_text('{"fingerprint": "of something else"}\n')
    (path / "journal").symlink_to(elsewhere)


def a_file(path: Path) -> None:
    path.write_text("years of work")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "found",
    [
        a_folder_with("thesis.txt"),
        a_folder_with("model/thesis.txt"),
        a_folder_with("journal", "downloads/thesis.txt"),
        a_diary,
        a_link,
        a_journal_that_is_a_link,
        a_file,
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_folder_that_is_no_workspace_is_never_emptied(
    dry_run: bool, found: Callable[[Path], None], checkpoint: CheckpointFactory, tmp_path: Path
) -> None:
    found(tmp_path / "out.partial")
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=r"out\.partial is where .*Move it away, or choose another --mlx-path"):
        convert(checkpoint("dense"), tmp_path / "out", dry_run=dry_run)
    with pytest.raises(ConversionError, match=r"out\.partial is where"), staged(tmp_path / "out", "work"):
        pytest.fail("it was taken for a workspace")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("resumes", [True, False])
def test_what_others_put_into_a_workspace_stays(
    resumes: bool, checkpoint: CheckpointFactory, tmp_path: Path, interrupt_after: Interrupt
) -> None:
    interrupt_after(5)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint("dense"), tmp_path / "out")
    (tmp_path / "out.partial" / "notes.txt").write_text("half of it is done")
    (tmp_path / "out.partial" / ".DS_Store").write_text("what Finder leaves")
    interrupt_after(0)
    for _ in range(2):
        convert(checkpoint("dense"), tmp_path / "out", resume=resumes, overwrite=True)
        assert (tmp_path / "out.partial" / "notes.txt").read_text() == "half of it is done"
    convert(checkpoint("dense"), tmp_path / "fresh")
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


class Killed(BaseException):
    """Nothing that runs after it reaches the disk, as after a kill."""


class Killer:
    """An audit hook that lets `left` file operations happen, and none after them; None lets all happen."""

    left: int | None = None

    def __call__(self, event: str, arguments: object) -> None:
        if self.left is None or event not in FILE_OPERATIONS:
            return
        if not self.left:
            raise Killed
        self.left -= 1


@pytest.fixture(scope="module")
def killer() -> Killer:
    hook = Killer()
    sys.addaudithook(hook)
    return hook


def write_model(target: Path, text: str) -> set[str]:
    """Write a model of which every file says `text`; returns what those of the one that it replaces said."""
    with staged(target, "work", overwrite=True) as space:
        replaced = {(target / name).read_text() for name in NAMES} if target.exists() else set()
        for name in NAMES:
            (space.folder / name).write_text(text)
    return replaced


@pytest.mark.parametrize("removed", [False, True])
def test_wherever_it_is_killed_a_whole_model_stays_and_the_next_conversion_goes_on(
    removed: bool, killer: Killer, tmp_path: Path
) -> None:
    for step in itertools.count():
        target = tmp_path / str(step) / "out"
        write_model(target, "old")
        killer.left = step
        with suppress(Killed):
            write_model(target, "new")
        finished, killer.left = killer.left > 0, None
        if removed:  # by somebody who wants neither model
            shutil.rmtree(target, ignore_errors=True)
        assert write_model(target, "newer") in (({"old"}, set()) if removed else ({"old"}, {"new"}))
        assert {path.name: path.read_text() for path in target.iterdir()} == dict.fromkeys(NAMES, "newer")
        assert list(target.parent.iterdir()) == [target]
        if finished:
            break
    assert step > 15, "too few operations were seen"


@pytest.mark.parametrize("done", range(3))
@pytest.mark.parametrize("fingerprint", ["work", "other"])
def test_a_journal_that_begins_anew_is_one_at_every_moment(
    fingerprint: str, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def until_killed(operation: Callable[..., int | None]) -> Callable[..., int | None]:
        def call(*arguments: object) -> int | None:
            if next(calls) == done:
                raise Killed
            return operation(*arguments)

        return call

    with suppress(KeyboardInterrupt), staged(tmp_path / "out", "work") as space:
        space.journal.commit(Record(3))
        (space.folder / "weights").touch()
        raise KeyboardInterrupt
    with locked(tmp_path / "out.partial" / "journal") as descriptor:
        begun = Journal(descriptor, fingerprint, resume=True)
        with monkeypatch.context() as context, pytest.raises(Killed):
            for name in ("write", "pwrite", "ftruncate", "fsync"):
                context.setattr(journal.os, name, until_killed(getattr(os, name)))
            begun.begin()
    check_workspace(tmp_path / "out")


def test_a_journal_cut_off_in_its_first_line_begins_anew(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    with suppress(KeyboardInterrupt), staged(tmp_path / "out", "work"):
        raise KeyboardInterrupt
    first_line = (work / "journal").read_bytes()
    for cut in range(len(first_line)):
        shutil.rmtree(work)
        work.mkdir()
        (work / "journal").write_bytes(first_line[:cut])
        with suppress(KeyboardInterrupt), staged(tmp_path / "out", "work"):
            raise KeyboardInterrupt
        assert (work / "journal").read_bytes() in (first_line, first_line[:cut] + b"\n" + first_line)


def test_a_file_of_the_workspace_that_may_not_be_written_is_named_beside_what_is_done(tmp_path: Path) -> None:
    work = tmp_path / "out.partial"
    work.mkdir()
    said = advice(PermissionError(errno.EACCES, "Permission denied", str(work / "journal")), tmp_path / "out")
    assert f"Give yourself the right to read and write {work / 'journal'}; {work} holds what is done" in said
    assert "--mlx-path" not in said, "another one would not go on from there"
