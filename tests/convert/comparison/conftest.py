"""Two checkpoints of one model: a reference, and one that differs from it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import CheckpointFactory
from tests.support.foreign import edit_tensors
from tests.support.tokenizers import add_tokenizer

TEXT = "A tool and the answer: which user is the one, and what is the question? " * 3
Perturb = Callable[[Path, str, float], Path]


@pytest.fixture(scope="session")
def reference(checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense checkpoint with a tokenizer. Do not write into it."""
    folder = tmp_path_factory.mktemp("comparison") / "reference"
    return add_tokenizer(shutil.copytree(checkpoint("dense"), folder))


@pytest.fixture
def perturbed(tmp_path: Path) -> Perturb:
    """`perturbed(source, name, share)`: a copy whose tensor `name` has noise of `share` of its norm added."""

    def make(source: Path, name: str, share: float) -> Path:
        copy = shutil.copytree(source, tmp_path / "perturbed")

        def add_noise(tensors: dict[str, torch.Tensor]) -> None:
            exact = tensors[name]
            noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
            tensors[name] = exact + noise * (share * exact.norm() / noise.norm())

        edit_tensors(copy, add_noise)
        return copy

    return make
