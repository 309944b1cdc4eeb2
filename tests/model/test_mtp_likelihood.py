"""Where a checkpoint is silent, the likelihood of its drafts tells what its MTP layer reads; once, and for good."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.demo import DEMO_FOLDER
from mlx_qwen.loading import load, load_model
from mlx_qwen.model import Model
from mlx_qwen.model.mtp_likelihood import Likelihoods, Text, mtp_likelihoods, settle_mtp_reads
from mlx_qwen.prompt import Processor
from tests.model.mtp_reference import mtp_logits
from tests.support.checkpoints import stored_tensors
from tests.support.silent import silent_copy

Checkpoint = Callable[..., Path]
SUM = "<|im_start|>user\nWhat is 58 + 67?<|im_end|>\n<|im_start|>assistant\n<think>\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-qwen" / "mtp"


def loaded(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def written(model: Model, processor: Processor) -> list[Text]:
    """A sum, worked out greedily."""
    prompt = processor.encode(SUM)
    ids = list(prompt)
    while len(ids) < len(prompt) + 60 and ids[-1] not in processor.end_token_ids:
        ids.append(int(np.array(model(mx.array([ids]))[0, -1].astype(mx.float32)).argmax()))
    return [Text(ids, len(prompt))]


@pytest.mark.parametrize("prompt", [0, 1, 9, 80])
def test_both_likelihoods_are_those_of_an_independent_torch_version(checkpoint: Checkpoint, prompt: int) -> None:
    """More tokens than one piece holds; what the prompt foretells is not counted."""
    path = checkpoint("dense", with_mtp=True)
    model, stored = loaded(path), stored_tensors(path)
    ids = np.random.default_rng(0).integers(0, 299, 150)
    hidden = torch.tensor(np.array(model.hidden_states(mx.array(ids[None, :-2]))))
    normed = torch.tensor(np.array(model.norm(mx.array(hidden.numpy()))))
    weights = {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")}
    embeddings = stored["model.embed_tokens.weight"][torch.tensor(ids[None, 1:-1])]
    found = mtp_likelihoods(model, [Text(ids.tolist(), prompt)])
    first = max(prompt, 1) + 1
    assert found.tokens == 150 - first
    for ours, states in ((found.normed, normed), (found.residual, hidden)):
        likely = mtp_logits(weights, states, embeddings, stored["lm_head.weight"]).log_softmax(-1)[0]
        expected = likely[torch.arange(first - 2, 148), torch.tensor(ids[first:])].mean().item()
        assert abs(ours - expected) <= 1e-4 * abs(expected)


@pytest.mark.parametrize("reads", ["normed", "residual"])
def test_the_better_one_is_taken_and_the_next_load_knows_it(tmp_path: Path, cache: Path, reads: str) -> None:
    folder = silent_copy(tmp_path / "silent", reads=reads)
    model, processor = load(folder)
    texts = written(model, processor)
    found = settle_mtp_reads(model, texts)
    assert found is not None and found.better == reads
    assert (model.mtp_reads, model.mtp_unsettled) == (reads, None)
    assert settle_mtp_reads(model, texts) is None
    again = loaded(folder)
    assert (again.mtp_reads, again.mtp_unsettled) == (reads, None)
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    assert kept == {"reads": reads, "normed": found.normed, "residual": found.residual, "tokens": found.tokens}


@pytest.mark.parametrize("damage", ["{", "[]", '{"reads": "else"}', '{"reads": ["normed"]}'])
def test_a_damaged_memory_means_finding_out_again(tmp_path: Path, cache: Path, damage: str) -> None:
    folder = silent_copy(tmp_path / "silent", reads="normed")
    model, processor = load(folder)
    texts = written(model, processor)
    settle_mtp_reads(model, texts)
    (file,) = cache.iterdir()
    file.write_text(damage)
    again = loaded(folder)
    assert again.mtp_reads == "normed" and again.mtp_unsettled is not None
    settle_mtp_reads(again, texts)
    assert loaded(folder).mtp_unsettled is None


def test_where_nothing_can_be_remembered_the_choice_holds_for_the_loaded_model(tmp_path: Path, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file in the place of the folder")
    model, processor = load(silent_copy(tmp_path / "silent", reads="residual"))
    settle_mtp_reads(model, written(model, processor))
    assert (model.mtp_reads, model.mtp_unsettled) == ("residual", None)


def test_a_checkpoint_that_says_it_is_never_measured(checkpoint: Checkpoint) -> None:
    model = loaded(DEMO_FOLDER)
    assert settle_mtp_reads(model, []) is None
    assert settle_mtp_reads(loaded(checkpoint("dense")), []) is None


def test_nothing_written_is_an_error_and_no_difference_means_the_released_way(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint("dense", with_mtp=True))
    with pytest.raises(ValueError, match="no text has two tokens behind its prompt"):
        mtp_likelihoods(model, [Text([1, 2, 3], 2), Text([], 0)])
    assert Likelihoods(-1.5, -1.5, 9).better == Likelihoods(float("nan"), -1.5, 9).better == "normed"
