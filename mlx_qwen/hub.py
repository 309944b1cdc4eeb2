"""Model folders, on this machine or on the Hugging Face Hub."""

import re
from pathlib import Path

from mlx_qwen.errors import CheckpointError

_REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "README.md", "LICENSE*")
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
    if not _REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        raise CheckpointError(
            f"{name} does not exist, and it is no Hub repository id either (expected one such as Qwen/Qwen3.5-0.8B). "
            "Check the path."
        )
    return _download(name, revision, [*_TEXT_FILES, *(_WEIGHT_FILES if weights else ())])


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
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
    except (HfHubHTTPError, OSError) as error:
        reason = f"the download failed ({error}). Try again; what was downloaded is kept"
    raise CheckpointError(f"{repo} cannot be loaded: {reason}.")
