"""A Hub repository without a copy of it: its files by name and size, their headers, and parts of them."""

from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.headers import PREFIX_BYTES, header_length, parse_header
from mlx_qwen.checkpoint.hub import hub_errors
from mlx_qwen.checkpoint.shards import TensorInfo, located
from mlx_qwen.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

# Most headers fit, so that one request is enough.
_FIRST_BYTES = 1 << 17
# A number that needs every bit of its dtype, so that rounding it never passes for exact.
_ONE_THIRD = {"BF16": 0x3EAB, "F16": 0x3555, "F32": 0x3EAAAAAB, "F64": 0x3FD5555555555555}


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository; `content` identifies what it holds."""

    name: str
    nbytes: int
    content: str


@dataclass(frozen=True, slots=True, eq=False)
class Repository:
    """One commit of a Hub repository."""

    name: str
    commit: str
    files: dict[str, RemoteFile]

    @property
    def shard_sizes(self) -> list[int]:
        """Bytes of every safetensors file."""
        return [file.nbytes for name, file in self.files.items() if name.endswith(".safetensors")]

    def missing_bytes(self) -> int:
        """Bytes of the safetensors files that the Hub's cache lacks; raises CheckpointError as `resolve` does."""
        from huggingface_hub import snapshot_download

        with hub_errors(self.name, self.commit):
            found = snapshot_download(
                self.name,
                revision=self.commit,
                allow_patterns="*.safetensors",
                tqdm_class=_stoppable(Event()),
                dry_run=True,
            )
        return sum(file.file_size or 0 for file in found if file.will_download)

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start:stop of a file, fewer where it ends before; raises CheckpointError as `resolve` does."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url = hf_hub_url(self.name, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
        with hub_errors(self.name, self.commit):
            response = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
        data = bytes(response.content)
        return data[start:stop] if response.status_code == 200 else data  # 200: the server sent the whole file

    def tensors(self, name: str, folder: Path, kind: "type[RemoteTensor]") -> dict[str, TensorInfo]:
        """What the header of one safetensors file says, as tensors, of `kind`, of the file of that name in `folder`.

        Raises CheckpointError when it is truncated or not such a file.
        """
        file_bytes, file = self.files[name].nbytes, folder / name
        start = self.read(name, 0, _FIRST_BYTES)
        try:
            length = header_length(start, file_bytes)
            header = start[PREFIX_BYTES : PREFIX_BYTES + length]
            if len(header) < length:
                header += self.read(name, len(start), PREFIX_BYTES + length)
            stored = parse_header(header, file, file_bytes)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(
                f"{name} of {self.name} cannot be read as safetensors ({error}). It is damaged there: use another "
                "revision or repository."
            ) from error
        return {key: kind.of(info, self) for key, info in located(stored, file).items()}

    def download(self, name: str, folder: Path, stopped: Event) -> None:
        """Put a file into `folder`, going on where an earlier download ended; ends early once `stopped` is set."""
        from huggingface_hub import hf_hub_download

        with hub_errors(self.name, self.commit):
            hf_hub_download(self.name, name, revision=self.commit, local_dir=folder, tqdm_class=_stoppable(stopped))


@dataclass(frozen=True, slots=True)
class RemoteTensor(TensorInfo):
    """A tensor that is read from its file once that was downloaded, and by requests to the Hub before."""

    repository: Repository

    @classmethod
    def of(cls, info: TensorInfo, repository: Repository) -> "RemoteTensor":
        """The tensor that `info` locates, in `repository`."""
        return cls(info.name, info.file, info.dtype, info.shape, info.offset, info.nbytes, repository)

    def load(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[np.generic]:
        """`count` items from byte `offset` of the file on; requests them where the file is not there."""
        if self.file.is_file():
            return TensorInfo.load(self, dtype, count, offset)
        data = self.repository.read(self.file.name, offset, offset + count * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype=dtype)


@dataclass(frozen=True, slots=True)
class UnreadTensor(RemoteTensor):
    """One of which sizes alone are asked: its floats are never requested, and taken to need every bit until then."""

    @property
    def actual(self) -> TensorInfo:
        """The one that is requested."""
        return RemoteTensor.of(self, self.repository)

    def load(self, dtype: npt.DTypeLike, count: int, offset: int) -> npt.NDArray[np.generic]:
        """One third everywhere before the file is there; integers, which say how the rest is laid out, as they are."""
        if self.dtype not in _ONE_THIRD or self.file.is_file():
            return RemoteTensor.load(self, dtype, count, offset)
        bits = np.array(_ONE_THIRD[self.dtype], dtype=f"u{np.dtype(dtype).itemsize}")
        return np.full(count, bits.view(dtype))


def find_repository(name: str, revision: str | None = None) -> Repository:
    """The files of a Hub repository at a branch, tag or commit; raises CheckpointError as `resolve` does."""
    from huggingface_hub import HfApi

    with hub_errors(name, revision):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    files = {}
    for sibling in info.siblings or ():
        content = sibling.blob_id if sibling.lfs is None else sibling.lfs.sha256
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size or 0, str(content))
    assert info.sha is not None, "the Hub names the commit"
    return Repository(name, info.sha, files)


def _stoppable(stopped: Event) -> "type[tqdm]":
    """A progress bar that shows nothing, and raises InterruptedError once `stopped` is set: a way to end a download."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stopped.is_set():
                raise InterruptedError("the conversion ended")
            super().update(n)

    return Bar
