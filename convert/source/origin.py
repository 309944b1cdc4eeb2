"""Where a conversion reads from: a folder, or a Hub repository whose weights stay there until they are needed."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_qwen.checkpoint.hub import local_folder, resolve
from mlx_qwen.checkpoint.remote import RemoteTensor, Repository, UnreadTensor, find_repository
from mlx_qwen.checkpoint.shards import Shelf, TensorInfo, checkpoint_tensors, companion_tensors
from mlx_qwen.errors import CheckpointError, ConversionError

from ..settings import Settings
from .folder import check_links, source_lines

Reading = Literal["files", "stream", "headers"]
# A file in it can never exist.
_NOWHERE = Path(os.devnull)
_REQUESTS = 8
# One shard is converted while the next one comes.
AHEAD = 2


@dataclass(frozen=True, slots=True)
class Origin:
    """`folder` holds everything, or all but the weights: these are then in `remote`, and `shelf` knows their headers.

    `repository` is the Hub id of what does not come from a folder of the user's own. `is_to_come` says that the weights
    are going to be downloaded into `folder`.
    """

    folder: Path
    repository: str | None
    remote: Repository | None = None
    shelf: Shelf | None = None
    is_to_come: bool = False

    @property
    def names(self) -> frozenset[str]:
        """The files of weights that are yet to come."""
        return frozenset() if self.shelf is None else self.shelf.names

    def tensors(self) -> dict[str, TensorInfo]:
        """The tensors of the main files; raises CheckpointError as `checkpoint_tensors` does."""
        return checkpoint_tensors(self.folder, self.shelf)

    def companion(self) -> dict[str, TensorInfo]:
        """The tensors of the companion files."""
        return companion_tensors(self.folder, self.shelf)

    def download_bytes(self, *, stream: bool) -> int:
        """What weights that are not on the disk take there: the most at a time if they `stream`, else what is missing.

        The former lie beside the target, the latter in the Hub's cache.
        """
        if self.remote is None:
            return 0
        return space_needed(self.remote.shard_sizes) if stream else self.remote.missing_bytes()

    def downloaded(self) -> "Origin":
        """The same with all of it in `folder`, which is downloaded; raises CheckpointError as `resolve` does."""
        if self.remote is None or not self.is_to_come:
            return self
        return _downloaded(self.remote.name, self.remote.commit)

    def lines(self) -> list[str]:
        """What is there, exactly enough to tell whether it changed."""
        if self.remote is None:
            return source_lines(self.folder)
        contents = (f"{file.name} {file.nbytes} {file.content}" for file in self.remote.files.values())
        return [self.remote.name, *sorted(contents)]


def open_origin(hf_path: str | Path, revision: str | None, reading: Reading, downloads: Path = _NOWHERE) -> Origin:
    """Find the source of a conversion.

    Of a repository all but its weights is fetched. "files" says that these are to come into the Hub's cache, by
    `downloaded`; for "stream" they are to be put into the folder `downloads` before they are read; with "headers" only
    sizes are asked. A folder is a folder, and what the cache holds whole is one too for "files".

    Raises CheckpointError as `resolve` does, and for a file that is a link out of the folder.
    """
    folder = local_folder(hf_path, revision)
    if folder is not None:
        return _checked(Origin(folder, None))
    if is_offline():
        return _downloaded(str(hf_path), revision)
    try:
        remote = find_repository(str(hf_path), revision)
    except CheckpointError:
        if reading != "files":
            raise
        return _downloaded(str(hf_path), revision)  # says the same, unless the cache holds everything
    is_to_come = reading == "files"
    if is_to_come and not remote.missing_bytes():
        return _downloaded(str(hf_path), revision)
    if is_to_come:
        resolve(hf_path, revision=revision, weights=False)  # so that the cache knows the commit by the revision's name
    folder = resolve(hf_path, revision=remote.commit, weights=False)
    kind = RemoteTensor if reading == "stream" else UnreadTensor
    place = folder if is_to_come else downloads

    def headers(names: Sequence[str]) -> Iterable[dict[str, TensorInfo]]:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            yield from pool.map(lambda name: remote.tensors(name, place, kind), names)

    return _checked(Origin(folder, str(hf_path), remote, Shelf(frozenset(remote.files), headers), is_to_come))


def _downloaded(name: str, revision: str | None) -> Origin:
    return _checked(Origin(resolve(name, revision=revision), name))


def check_streaming(hf_path: str | Path, settings: Settings, *, verify: bool) -> None:
    """Raise ConversionError where shards cannot be read one after the other and removed, or there is nothing to."""
    if verify:
        raise ConversionError(
            "Verifying reads the source once more, of which streaming removes what was converted. Leave --verify or "
            "--stream-from-hub out."
        )
    folder = local_folder(hf_path)
    if folder is not None:
        raise ConversionError(f"{folder} is a folder on this machine already. Leave --stream-from-hub out.")
    if settings.reads_values or settings.calibration is not None:
        raise ConversionError(
            "A size to meet, the dtype auto and a calibration read all weights before the first one is written. Leave "
            "--stream-from-hub out, or name a recipe and a dtype, without calibration."
        )
    if is_offline():
        raise ConversionError("Nothing can be streamed while HF_HUB_OFFLINE is set. Unset it.")


def is_offline() -> bool:
    """Whether the user turned the Hub off by HF_HUB_OFFLINE; its cache is then all there is."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _checked(origin: Origin) -> Origin:
    check_links(origin.folder)
    return origin


def space_needed(sizes: Iterable[int]) -> int:
    """The most bytes that files of these sizes take on the disk at a time."""
    return sum(sorted(sizes, reverse=True)[:AHEAD])
