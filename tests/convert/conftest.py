"""Fixtures for conversions that are cut off, and for those of a Hub repository."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from huggingface_hub import constants

from mlx_qwen.checkpoint import remote as repository
from mlx_qwen.convert.progress import Progress
from mlx_qwen.convert.work import write as weights
from tests.conftest import CheckpointFactory
from tests.support.hub import REPOSITORY, FakeHub, MakeHub, serve

Interrupt = Callable[[int], None]


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """`interrupt_after(n)`: Ctrl-C while piece n + 1 of the next conversion is counted; 0 lets it finish."""
    monkeypatch.setattr(weights, "RECORD_BYTES", 1)
    produced: list[object] = []

    def install(n: int) -> None:
        produced.clear()

        class Counting(Progress):
            def advance(self, nbytes: int) -> None:
                if n and len(produced) == n:
                    raise KeyboardInterrupt
                produced.append(nbytes)
                super().advance(nbytes)

        # Of writing only: what is measured before it is no piece.
        monkeypatch.setattr(weights, "Progress", Counting)

    return install


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[MakeHub]:
    """`hub(folder)`: a Hub that has the folder as "someone/tiny", which huggingface_hub asks from now on."""
    with ExitStack() as stack:

        def make(folder: Path) -> FakeHub:
            fake = stack.enter_context(serve(FakeHub(REPOSITORY, folder)))
            # What HF_ENDPOINT and the like say is read once, at import.
            template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "ENDPOINT", fake.url)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
            # The first request for a header would otherwise get most of these small files.
            monkeypatch.setattr(repository, "_FIRST_BYTES", 500)
            return fake

        yield make


@pytest.fixture
def sharded(checkpoint: CheckpointFactory) -> Path:
    """A checkpoint of ten shards or more."""
    folder = checkpoint("moe", with_mtp=True, dtype="bfloat16", shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 8
    return folder
