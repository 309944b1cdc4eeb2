"""Perplexity, divergence and agreement are what transformers' logits say they are."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import Comparison, compare
from mlx_qwen.convert.comparison import distributions, evaluation_text
from mlx_qwen.prompt import Processor
from tests.convert.comparison.conftest import TEXT, Perturb
from tests.support.checkpoints import reference_logits

WINDOW = 40


def windows(folder: Path, text: str) -> list[Tensor]:
    """The windows [1, T] that the text is cut into, the rest being one too."""
    ids = Processor.from_directory(folder, ModelConfig.from_directory(folder)).encode(text)
    return [torch.tensor([ids[i : i + WINDOW]]) for i in range(0, len(ids), WINDOW)]


def log_probabilities(folder: Path, text: str) -> tuple[Tensor, Tensor]:
    """Of every token but each window's first: log p [N, V] in float64, and its id [N]."""
    parts = [(reference_logits(folder, ids)[0, :-1].double(), ids[0, 1:]) for ids in windows(folder, text)]
    logits, ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return torch.log_softmax(logits, dim=-1), ids


def perplexity(log_p: Tensor, ids: Tensor) -> float:
    return float(torch.exp(-log_p.gather(1, ids[:, None]).mean()))


@pytest.fixture
def other(reference: Path, perturbed: Perturb) -> Path:
    return perturbed(reference, "model.layers.1.mlp.up_proj.weight", 0.5)


@pytest.mark.parametrize("blocks", [(8192, 512), (100, 7)], ids=["at_once", "in_blocks"])
def test_every_figure_is_that_of_transformers_logits(
    reference: Path, other: Path, blocks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "VOCABULARY_BLOCK", blocks[0])
    monkeypatch.setattr(distributions, "_TOKENS", blocks[1])
    found = compare(reference, other, text=TEXT, window=WINDOW)
    (log_p, ids), (log_q, _) = log_probabilities(reference, TEXT), log_probabilities(other, TEXT)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
    assert found.tokens == len(ids)
    assert found.perplexity_a == pytest.approx(perplexity(log_p, ids), rel=1e-4)
    assert found.perplexity_b == pytest.approx(perplexity(log_q, ids), rel=1e-4)
    assert found.mean_divergence == pytest.approx(divergence.mean(), rel=1e-3)
    assert found.p99_divergence == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    assert found.agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_a_model_does_not_differ_from_itself(reference: Path) -> None:
    found = compare(reference, reference, text=TEXT, window=WINDOW)
    assert (found.mean_divergence, found.p99_divergence, found.agreement) == (0, 0, 1)
    assert found.perplexity_a == found.perplexity_b
    assert not any(found.layers)
    assert found.worst() == ()


def test_no_more_tokens_are_read_than_asked_for(reference: Path) -> None:
    assert compare(reference, reference, text=TEXT, tokens=50, window=20).tokens == 50 - 3
    assert compare(reference, reference, text=TEXT, tokens=41, window=20).tokens == 41 - 2 - 1


def test_a_text_file_is_read(reference: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    assert compare(reference, reference, text=file) == compare(reference, reference, text=TEXT)


def test_a_varied_text_comes_with_the_package() -> None:
    text = evaluation_text()
    assert 10_000 < len(text.encode()) < 20_000
    assert all(part in text for part in ("def ", "SELECT", "\\sum", "Straßenbahn", "木匠", "喫茶店", "Поезд"))


def test_both_may_be_compared_in_half_precision(reference: Path) -> None:
    found: Comparison = compare(reference, reference, text=TEXT, dtype="bfloat16")
    exact = compare(reference, reference, text=TEXT)
    assert found.mean_divergence == 0
    assert found.perplexity_a != exact.perplexity_a
    assert found.perplexity_a == pytest.approx(exact.perplexity_a, rel=0.05)
