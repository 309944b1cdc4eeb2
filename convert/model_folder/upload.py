"""Puts a converted model on the Hugging Face Hub, after asking, before the work, whether that will be allowed."""

from pathlib import Path

from mlx_qwen.checkpoint.hub import is_repository_id, network_errors
from mlx_qwen.config import Json
from mlx_qwen.errors import ConversionError
from mlx_qwen.version import __version__


def check_upload(repo: str) -> str:
    """The full name of the repository `repo`, of the user's own where it names no owner.

    Raises ConversionError unless the user is logged in to the Hub, and the token may write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    if not is_repository_id(repo):
        raise ConversionError(f"{repo!r} is no Hub repository, expected one such as someone/Qwen3.5-0.8B-4bit.")
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ConversionError(
            f"You are not logged in to the Hub, so nothing can be uploaded to {repo}. Log in with `hf auth login`."
        ) from None
    except network_errors() as error:
        raise ConversionError(
            f"The Hub does not say who you are ({error}), so nothing can be uploaded to {repo}. Log in with "
            "`hf auth login`, or leave --upload out."
        ) from error
    full = repo if "/" in repo else f"{user['name']}/{repo}"
    _check_owner(user, full)
    _check_token(user, full)
    return full


def upload_folder(folder: Path, repo: str) -> str:
    """Upload everything in `folder` to the model repository `repo`, made if need be; returns its address."""
    from huggingface_hub import HfApi

    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repo, folder_path=folder, commit_message=f"Upload a model converted with mlx-qwen {__version__}"
        )
    except network_errors() as error:
        raise ConversionError(
            f"{folder} is complete, but was not uploaded ({error}). Try again with `hf upload {repo} {folder}`."
        ) from error
    return str(url)


def _check_owner(user: Json, repo: str) -> None:
    owner, name = repo.partition("/")[0], user["name"]
    roles = {org["name"]: org.get("roleInOrg") for org in user.get("orgs") or ()}
    if owner == name or roles.get(owner, "read") != "read":
        return
    if owner in roles:
        raise ConversionError(f"You are {name}, who may only read what {owner} has. Ask there for the right to write.")
    writable = ", ".join([name, *(org for org, role in roles.items() if role != "read")])
    raise ConversionError(f"You are {name}, who cannot upload to {repo}. Expected a repository of {writable}.")


def _check_token(user: Json, repo: str) -> None:
    token = (user.get("auth") or {}).get("accessToken") or {}  # other ways to log in have none
    writes = token.get("role") != "read"
    if token.get("role") == "fineGrained":
        scopes = (token.get("fineGrained") or {}).get("scoped") or ()
        places = (repo, repo.partition("/")[0])
        writes = any("repo.write" in scope["permissions"] and scope["entity"].get("name") in places for scope in scopes)
    if not writes:
        raise ConversionError(
            f"Your Hub token may not write to {repo}. Make one that may on huggingface.co/settings/tokens, and log in "
            "with it: `hf auth login`."
        )
