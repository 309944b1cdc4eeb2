"""Fixtures that every test folder shares."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.torchvision_operators import provide_torchvision

# Before anything imports transformers, which looks for it once.
provide_torchvision()

# Some GPUs multiply fp32 matrices at lower precision unless told not to; set before MLX is imported.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# How long an example takes tells what else runs here.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """`checkpoint(kind, **options)`: the path of a tiny checkpoint, made once a session. Do not write into it."""
    from tests.support.checkpoints import tiny_checkpoint

    made: dict[object, Path] = {}

    def make(kind: str, **options: object) -> Path:
        key = (kind, *sorted(options.items()))
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp(kind), kind, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint with a tokenizer and a chat template: all that `load` needs. Do not write into it."""
    from tests.support.checkpoints import tiny_checkpoint
    from tests.support.tokenizers import add_tokenizer

    return add_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("chat"), "dense"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is remembered in the user's cache folder, and nothing that is there is found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if "METAL_EMULATOR_CACHE" not in os.environ:  # what is compiled once serves every test, in every worker
            base = tmp_path_factory.getbasetemp()
            shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
            patch.setenv("METAL_EMULATOR_CACHE", str(shared / "metal-emulator"))
        yield


@pytest.fixture(autouse=True)
def _cache_folder_of_this_test(
    _own_cache_folder: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one test lets a model find out, as what its MTP layer reads, no other test recalls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Let Ctrl-C raise in tests that send it, also where the tests were started in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
