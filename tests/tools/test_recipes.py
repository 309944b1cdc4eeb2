"""The table of recipes judges every conversion by the same text, and knows what it does not know."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mlx_qwen.errors import MLXQwenError
from tests.support.checkpoints import tiny_checkpoint
from tests.support.tokenizers import add_tokenizer
from tools.benchmarks import recipes
from tools.benchmarks.__main__ import main
from tools.benchmarks.recipes import bench_recipes, divergences


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return add_tokenizer(tiny_checkpoint(tmp_path / "source", "dense", dtype="bfloat16"))


def test_every_recipe_and_quantizer_stands_beside_mlx_lm_in_order_of_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in (("RECIPES", ("4bit",)), ("MLX_LM_BITS", (4,)), ("MLX_LM_MIXED", ()), ("FITTED", ("4 bits",))):
        monkeypatch.setattr(recipes, name, few)
    text = tmp_path / "text.txt"
    words = np.random.default_rng(0).choice(["what", "is", "the", "answer", "and", "which", "tool"], 600)
    text.write_text(" ".join(words))
    table = bench_recipes(folder, text, tmp_path, windows=1)
    assert {row[0] for row in table.rows} == {
        "mlx-lm 4 bits",
        "mlx-qwen 4bit, rtn",
        "mlx-qwen 4bit, search",
        "mlx-qwen 4bit, gptq, own text",
        "mlx-qwen 4bit, gptq, default text",
        "mlx-qwen of that size (4 bits), search",
        "mlx-qwen of that size (4 bits), gptq, own text",
    }
    sizes = [float(row[1].removesuffix(" MB")) for row in table.rows]
    assert sizes == sorted(sizes)
    size = dict(zip((row[0] for row in table.rows), sizes, strict=True))
    for how in ("search", "gptq, own text"):
        assert 0.9 * size["mlx-lm 4 bits"] < size[f"mlx-qwen of that size (4 bits), {how}"] <= size["mlx-lm 4 bits"]
    divergence = {row[0]: float(row[2]) for row in table.rows}
    assert divergence["mlx-qwen 4bit, gptq, own text"] < divergence["mlx-qwen 4bit, rtn"]
    assert "256 tokens in windows of 256" in table.note


def test_divergence_is_torchs() -> None:
    generator = np.random.default_rng(0)
    truth, other = (generator.normal(0, 3, (2, 5, 40)).astype(np.float32) for _ in range(2))
    p, q = (torch.log_softmax(torch.from_numpy(x), dim=-1) for x in (truth, other))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    assert np.allclose(divergences(other, truth), expected, rtol=1e-4)


def test_a_text_that_is_too_short_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("what is the answer?")
    with pytest.raises(MLXQwenError, match="expected at least 256"):
        bench_recipes(folder, tmp_path / "text.txt", tmp_path)


def test_recipes_without_a_text_say_what_they_need() -> None:
    result = CliRunner().invoke(main, ["recipes"])
    assert result.exit_code == 2
    assert "recipes needs --model" in result.output
