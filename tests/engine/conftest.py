"""One small random model with a tokenizer, shared by the tests of this folder."""

from pathlib import Path
from typing import NamedTuple

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.template import ChatTemplate
from tests.support.tokenizers import CHAT_TEMPLATE, tiny_tokenizer


class Loaded(NamedTuple):
    """A model, its processor and the folder they came from. The processor knows no end token."""

    model: Model
    processor: Processor
    folder: Path


def make_processor(*, ends: tuple[int, ...] = (), **changes: object) -> Processor:
    """A processor whose answers end only at `ends`, so that random models write as long as they may."""
    template = ChatTemplate({"default": CHAT_TEMPLATE})
    return Processor(tiny_tokenizer(), template=template, end_token_ids=frozenset(ends), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def loaded(checkpoint) -> Loaded:
    folder = checkpoint("dense")
    return Loaded(load_model(folder, ModelConfig.from_directory(folder)), make_processor(), folder)


@pytest.fixture(autouse=True)
def _nothing_read_before(request: pytest.FixtureRequest) -> None:
    """Every test of the shared model begins with an engine that remembers no prompts."""
    if "loaded" in request.fixturenames:
        request.getfixturevalue("loaded").model.engine = None
