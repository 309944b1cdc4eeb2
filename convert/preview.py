"""What is found out about a Hub repository before its weights are downloaded."""

import warnings
from dataclasses import replace
from pathlib import Path

from mlx_qwen.checkpoint.hub import local_folder
from mlx_qwen.errors import CheckpointError

from .comparison import check_verifiable
from .job import plan_job
from .settings import AUTO, Settings
from .source.origin import is_offline, open_origin
from .writing.room import check_space


def check_before_download(
    hf_path: str | Path,
    revision: str | None,
    settings: Settings,
    target: Path,
    *,
    verify: bool = False,
    text: Path | None = None,
) -> None:
    """Raise ConversionError when the disks have no room for what is to be downloaded and for the output.

    Reads headers, so that a repository that cannot be converted is found too: raises as `convert` does, and with
    `verify` as `check_verifiable` does for `text`. Files that the Hub's cache holds count as nothing.
    """
    if local_folder(hf_path, revision) is not None or is_offline():
        return
    try:
        origin = open_origin(hf_path, revision, "headers")
    except CheckpointError:
        return  # downloading says the same, unless the cache holds everything
    download = origin.download_bytes(stream=False)
    if not download:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what there is to remark is remarked on by the conversion itself
        job = plan_job(origin, _without_values(settings), progress=False)
    if verify:
        check_verifiable(job.source, job.config, text)
    needed = job.output_bytes
    if settings.target_size is not None:
        needed = min(needed, settings.target_size)
    check_space(target, needed, download=download)


def _without_values(settings: Settings) -> Settings:
    """`settings`, but where they leave choices to the weights, those that take most room."""
    dtype = "bfloat16" if settings.dtype == AUTO else settings.dtype
    recipe = settings.recipe if settings.target_size is None else None
    return replace(settings, dtype=dtype, recipe=recipe, target_size=None)
