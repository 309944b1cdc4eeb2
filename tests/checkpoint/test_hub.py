"""Folders and Hub repositories are found, or the error says what to do."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from mlx_qwen.checkpoint.hub import resolve
from mlx_qwen.errors import CheckpointError


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["./missing", "a/b/c", "/nowhere/model", "two words"])
def test_what_is_neither_folder_nor_repository_says_so(name: str) -> None:
    with pytest.raises(CheckpointError, match="does not exist, and it is no Hub repository id"):
        resolve(name)


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"Give the folder that holds config\.json"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no revision 'main'"):
        resolve(tmp_path, revision="main")


def test_without_network_the_error_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot be reached .* give the path of the folder"):
        resolve("Qwen/Qwen3.5-0.8B")


@pytest.mark.parametrize(("weights", "expected"), [(True, True), (False, False)])
def test_weights_are_downloaded_only_when_wanted(
    weights: bool, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("Qwen/Qwen3.5-0.8B", revision="abc", weights=weights) == tmp_path
    assert (asked["repo"], asked["revision"]) == ("Qwen/Qwen3.5-0.8B", "abc")
    assert ("*.safetensors" in asked["patterns"]) is expected  # type: ignore[operator]
