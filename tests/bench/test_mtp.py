"""Acceptance by depth counts the chains of drafts that go as the model's own text does."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from mlx_qwen.bench.mtp import chains, demo_prompts, passes, shares, written
from mlx_qwen.cli import main
from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load, load_model
from mlx_qwen.model.mtp_likelihood import Text
from tests.model.mtp_reference import mtp_chain
from tests.support.checkpoints import stored_tensors
from tests.support.tokenizers import add_tokenizer

Checkpoint = Callable[..., Path]


def drafts(path: Path, states: torch.Tensor, ids: list[int], start: int, depth: int) -> list[int]:
    """What torch drafts from the token at `start` on, each draft fed to the next."""
    stored = stored_tensors(path)
    weights = {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")}
    embed, head, found = stored["model.embed_tokens.weight"], stored["lm_head.weight"], list[int]()
    following = embed[torch.tensor(ids[1 : start + 2])][None]
    while len(found) < depth:
        before = embed[torch.tensor(found, dtype=torch.long)][None]
        logits = mtp_chain(weights, states[:, : start + 1], following, head, before)
        found.append(int(logits[-1][0].argmax()))
    return found


def attentive(source: Path, folder: Path) -> Path:
    """A copy of a tiny checkpoint whose MTP layer lives on sharp attention, so that a lost key changes its drafts."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model-mtp.safetensors")
    for part, scale, shift in (("o_proj", 20, 0), ("q_norm", 1, 2), ("k_norm", 1, 2)):
        name = f"mtp.layers.0.self_attn.{part}.weight"
        tensors[name] = scale * tensors[name] + shift
    save_file(tensors, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    return folder


def test_chains_are_followed_from_every_place_as_far_as_they_are_right(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The text is made of drafts, so that chains from its prompt are right to a known depth."""
    path = attentive(checkpoint("dense", with_mtp=True), tmp_path / "attentive")
    model = load_model(path, ModelConfig.from_directory(path))
    ids = np.random.default_rng(0).integers(0, 299, 9).tolist()

    def states(ids: list[int]) -> torch.Tensor:
        return torch.tensor(np.array(model.norm(model.hidden_states(mx.array([ids])))))

    for depth in (3, 1, 2):
        ids += [*drafts(path, states(ids[:-1]), ids, len(ids) - 2, depth), 7]
    text, whole = Text(ids, 8), states(ids[:-1])
    expected = []
    for start in range(7, len(ids) - 2):
        ahead = ids[start + 2 : start + 6]
        found = drafts(path, whole, ids, start, len(ahead))
        expected.append(next((step for step, token in enumerate(ahead) if found[step] != token), len(ahead)))
    assert chains(model, text, depth=4) == expected
    assert expected[0] == 3 and {0, 1, 2, 3} <= {*expected}


def test_shares_count_the_chains_that_the_text_is_long_enough_for() -> None:
    runs = [[3, 2, 0, 1], [1]]
    assert shares(runs, depth=4) == [4 / 5, 2 / 3, 1 / 2, 0]
    assert shares([], depth=2) == [0, 0]


def test_a_pass_writes_its_right_drafts_and_one_token_more() -> None:
    assert [passes(run) for run in ([], [0], [1], [0, 0, 0], [7, 0, 0], [1, 0, 1, 0], [3, 2, 1, 0, 0])] == [
        *(0, 1, 1, 3, 1, 2, 2)
    ]


def test_what_is_drafted_is_what_greedy_decoding_writes() -> None:
    model, processor = load()
    prompt = demo_prompts(processor)["sums"][0]
    text = written(model, processor, prompt, 40)
    assert text.ids[: text.prompt] == prompt and 2 < len(text.ids) - text.prompt <= 40
    logits = np.array(model(mx.array([text.ids[:-1]])).astype(mx.float32))[0]
    assert logits.argmax(-1)[text.prompt - 1 :].tolist() == text.ids[text.prompt :]
    assert len(text.ids) == text.prompt + 40 or text.ids[-1] in processor.end_token_ids


def test_the_command_shows_both_likelihoods_which_is_used_and_seven_depths() -> None:
    result = CliRunner().invoke(main, ["bench", "--mtp", "--generate-tokens", "8"])
    assert result.exit_code == 0, result.output
    assert "In use: normed" in result.output
    assert "| normed: behind the final norm | -" in result.output
    assert "| residual: before it           | -" in result.output
    (sums,) = [line for line in result.output.splitlines() if line.startswith("| sums")]
    first, *later = [float(cell) for cell in sums.split("|")[3:10]]
    assert first > 0.9 and len(later) == 6 and all(0 <= share <= 1 for share in later)


def test_a_model_without_the_layer_is_told_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tests.support.checkpoints import tiny_checkpoint

    folder = add_tokenizer(tiny_checkpoint(tmp_path / "plain", "dense"))
    result = CliRunner().invoke(main, ["bench", "--mtp", "--model", str(folder)])
    assert result.exit_code == 1
    assert "no MTP layer to draft with" in result.output + str(result.exception)


@pytest.mark.parametrize("with_template", [True, False])
def test_any_model_is_asked_for_code_prose_and_lists(tmp_path: Path, with_template: bool, monkeypatch) -> None:
    from tests.support.checkpoints import tiny_checkpoint

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = add_tokenizer(tiny_checkpoint(tmp_path / "own", "dense", with_mtp=True))
    if not with_template:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    result = CliRunner().invoke(main, ["bench", "--mtp", "--model", str(folder), "--generate-tokens", "12"])
    assert result.exit_code == 0, result.output
    assert "as was found out now" in result.output
    assert all(f"| {kind} " in result.output for kind in ("code", "prose", "lists"))
    assert "found out before" in CliRunner().invoke(main, ["bench", "--mtp", "--model", str(folder)]).output
