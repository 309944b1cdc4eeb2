"""Uploads are asked for before the work, and happen after it."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from mlx_qwen.convert import conversion, convert
from mlx_qwen.convert.model_folder.upload import check_upload
from mlx_qwen.errors import ConversionError
from tests.conftest import CheckpointFactory

USER = {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]}


class Hub:
    """Stands in for HfApi: answers `whoami` with `user`, and notes what is made and uploaded."""

    def __init__(self, user: dict[str, object] | Exception, failure: Exception | None = None) -> None:
        self.user, self.failure = user, failure
        self.made: list[str] = []
        self.uploaded: dict[str, list[str]] = {}

    def __call__(self) -> "Hub":
        return self

    def whoami(self) -> dict[str, object]:
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def create_repo(self, repo: str, *, exist_ok: bool) -> str:
        assert exist_ok
        self.made.append(repo)
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.failure is not None:
            raise self.failure
        self.uploaded[repo_id] = sorted(path.name for path in folder_path.iterdir())


def token(role: str, *scopes: tuple[str, str]) -> dict[str, object]:
    scoped = [{"entity": {"name": name}, "permissions": [permission]} for name, permission in scopes]
    return {**USER, "auth": {"accessToken": {"role": role, "fineGrained": {"scoped": scoped}}}}


@pytest.mark.parametrize("repo", ["tiny", "ada/tiny"])
def test_the_output_is_uploaded_with_its_card(
    repo: str, checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(token("write"))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    report = convert(checkpoint("dense"), tmp_path / "out", upload=repo)
    assert hub.made == ["ada/tiny"]
    assert hub.uploaded == {"ada/tiny": sorted(path.name for path in (tmp_path / "out").iterdir())}
    assert "README.md" in hub.uploaded["ada/tiny"]
    assert report.url == "https://huggingface.co/ada/tiny"
    assert report.url in report.table()


@pytest.mark.parametrize(
    ("user", "repo", "complaint"),
    [
        (LocalTokenNotFoundError("none"), "ada/tiny", "not logged in .* `hf auth login`"),
        (OSError("no route"), "ada/tiny", r"does not say who you are \(no route\)"),
        (token("write"), "eve/tiny", "You are ada, who cannot upload to eve/tiny. Expected a repository of ada, lab"),
        (token("write"), "museum/tiny", "may only read what museum has"),
        (token("read"), "ada/tiny", "token may not write to ada/tiny"),
        (token("fineGrained"), "ada/tiny", "token may not write"),
        (token("fineGrained", ("lab", "repo.write")), "ada/tiny", "token may not write"),
        (token("fineGrained", ("ada", "repo.content.read")), "ada/tiny", "token may not write"),
        (token("write"), "a/b/c", "is no Hub repository"),
    ],
)
def test_nothing_is_converted_when_the_upload_would_fail(
    user: dict[str, object] | Exception, repo: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(user))
    monkeypatch.setattr(conversion, "open_origin", pytest.fail)
    with pytest.raises(ConversionError, match=complaint):
        convert("someone/source", tmp_path / "out", upload=repo)


@pytest.mark.parametrize("repo", ["lab/tiny", "ada/tiny"])
def test_tokens_for_single_places_may_write_there(repo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    user = token("fineGrained", ("lab", "repo.write"), ("ada/tiny", "repo.write"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(user))
    assert check_upload(repo) == repo


def test_an_upload_that_fails_keeps_the_output_and_says_how_to_go_on(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub(token("write"), failure=OSError("connection reset")))
    expected = r"is complete, but was not uploaded \(connection reset\).*hf upload ada/tiny"
    with pytest.raises(ConversionError, match=expected):
        convert(checkpoint("dense"), tmp_path / "out", upload="ada/tiny")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_dry_run_uploads_nothing(
    checkpoint: CheckpointFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(token("write"))
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    assert convert(checkpoint("dense"), tmp_path / "out", upload="ada/tiny", dry_run=True).url is None
    assert hub.made == []
