"""Model folders, on this machine or on the Hugging Face Hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_qwen.errors import CheckpointError

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*", "LICENCE*", "NOTICE*")
_WEIGHT_FILES = ("*.safetensors",)


def resolve(path_or_repo: str | Path, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a model: a local one as it is, a Hub repository downloaded into the Hub's cache.

    Args:
        path_or_repo: a folder, or a repository id such as "Qwen/Qwen3.5-0.8B".
        revision: branch, tag or commit of the repository; a local folder has none.
        weights: False leaves the safetensors files out, for work that only reads configs and tokenizers.

    Raises:
        CheckpointError: the folder does not exist, or the repository cannot be reached, found or read.
    """
    path = local_folder(path_or_repo, revision)
    if path is not None:
        return path
    patterns = [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())]

    from huggingface_hub import snapshot_download

    with hub_errors(str(path_or_repo), revision):
        return Path(snapshot_download(str(path_or_repo), revision=revision, allow_patterns=patterns))


def local_folder(path_or_repo: str | Path, revision: str | None = None) -> Path | None:
    """The folder on this machine, None for what looks like a Hub repository; raises CheckpointError for other names."""
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a folder on this machine, which has no revision {revision!r}. Leave it out."
            )
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file, expected a model folder. Give the folder that holds config.json.")
    name = str(path_or_repo)
    if not is_repository_id(name):
        raise CheckpointError(
            f"{name} does not exist, and it is no Hub repository id either (expected one such as Qwen/Qwen3.5-0.8B). "
            "Check the path."
        )
    return None


def is_repository_id(name: str) -> bool:
    """Whether the Hub could have a repository of this name."""
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises while it reads `repo` into a CheckpointError that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
        return
    except GatedRepoError:
        reason = "it is gated: accept its terms on huggingface.co, then log in with `hf auth login`"
    except RevisionNotFoundError:
        reason = f"it has no revision {revision!r}. Give a branch, tag or commit that exists"
    except RepositoryNotFoundError:
        reason = (
            "there is no such repository (or it is private: log in with `hf auth login`), nor a folder of that name"
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = (
            "the Hub cannot be reached (or HF_HUB_OFFLINE is set), it is not in the local cache, and there is no "
            "folder of that name. Connect to the network, or download it elsewhere and give the path of the folder"
        )
    except network_errors() as error:
        reason = f"the download failed ({error}). Try again; what was downloaded is kept"
    raise CheckpointError(f"{repo} cannot be loaded: {reason}.")


def network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when a request fails in whatever way."""
    from huggingface_hub.errors import HfHubHTTPError

    # HTTPError is that of httpx or of its successor, whichever huggingface_hub is built on.
    http_error = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    assert issubclass(http_error, Exception)
    return (HfHubHTTPError, http_error, OSError)
