"""Answers about images are the same, whoever guesses their tokens ahead."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.generation import stream_generate
from mlx_qwen.loading import load_model
from mlx_qwen.model import Model
from mlx_qwen.prompt import Processor
from tests.vision.drawing import drawing


@pytest.mark.parametrize("chosen", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}], ids=["greedy", "drawn"])
def test_a_draft_model_that_reads_text_alone_and_lookup_change_no_answer(
    seeing: tuple[Model, Processor], checkpoint: Callable[..., Path], chosen: dict[str, float]
) -> None:
    path = checkpoint("dense")
    draft = load_model(path, ModelConfig.from_directory(path))
    question = [
        {"role": "user", "content": [{"type": "image", "image": drawing(32, 24)}, {"type": "text", "text": "what?"}]}
    ]

    def answer(**options: object) -> list[int]:
        found = stream_generate(*seeing, question, max_tokens=16, **chosen, **options)  # type: ignore[arg-type]
        return [response.token for response in found]

    plain = answer(mtp=0, prefix_cache=False)
    assert answer(draft_model=draft, num_draft_tokens=3) == plain
    assert answer(draft_model=draft, prompt_lookup=True) == plain
