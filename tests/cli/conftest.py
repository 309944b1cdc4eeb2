"""A checkpoint folder as users have it: weights, tokenizer and chat template."""

from pathlib import Path

import pytest

from tests.support.tokenizers import add_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.checkpoints import tiny_checkpoint

    return add_tokenizer(tiny_checkpoint(tmp_path_factory.mktemp("cli"), "dense"))
