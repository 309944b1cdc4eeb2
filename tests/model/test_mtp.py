"""The MTP layer is loaded with the model and computes what its definition says."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.loading import load_model
from mlx_qwen.media.grids import Kind as MediaKind
from mlx_qwen.model import Model
from mlx_qwen.model.multimodal import Pixels
from mlx_qwen.model.state import empty_state
from tests.model.mtp_reference import mtp_chain, mtp_logits
from tests.support.checkpoints import Kind, reference_model, stored_tensors

Checkpoint = Callable[..., Path]
KINDS = ["dense", "moe", "next"]


def load(path: Path) -> Model:
    return load_model(path, ModelConfig.from_directory(path))


def ids(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 299, shape)


def mtp_tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in stored_tensors(path).items() if name.startswith("mtp.")}


def embedded(path: Path, tokens: np.ndarray) -> torch.Tensor:
    return stored_tensors(path)["model.embed_tokens.weight"][torch.tensor(tokens)]


def transformers_states(path: Path, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' states before and after the final norm, [B, T, h]."""
    before = []
    decoder = reference_model(path).model
    decoder.norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    with torch.no_grad():
        after = decoder(input_ids=torch.tensor(tokens), use_cache=False).last_hidden_state
    return before[0], after


def close(found: mx.array, expected: torch.Tensor) -> bool:
    return bool(np.abs(np.array(found) - expected.numpy()).max() <= 2e-4 * expected.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_it_reads_what_transformers_final_norm_gives(checkpoint: Checkpoint, kind: Kind) -> None:
    path, tokens = checkpoint(kind, with_mtp=True), ids(2, 21)
    model = load(path)
    _, states = transformers_states(path, tokens[:, :-1])
    head = stored_tensors(path)["lm_head.weight"]
    expected = mtp_logits(mtp_tensors(path), states, embedded(path, tokens[:, 1:]), head)
    hidden, following = model.hidden_states(mx.array(tokens[:, :-1])), mx.array(tokens[:, 1:])
    assert close(model.mtp_logits(hidden, following), expected)
    memory, pieces = model.mtp_memory(), []
    for a, b in ((0, 8), (8, 9), (9, 20)):
        logits, _, memory = model.mtp_step(hidden[:, a:b], following[:, a:b], memory)
        pieces.append(logits)
    assert close(mx.concatenate(pieces, axis=1), expected)


def test_a_layer_that_was_trained_on_residual_sums_is_given_them(checkpoint: Checkpoint) -> None:
    path, tokens = checkpoint("dense", with_mtp=True), ids(2, 21)
    model = load(path)
    model.mtp_reads = "residual"
    states, _ = transformers_states(path, tokens[:, :-1])
    head = stored_tensors(path)["lm_head.weight"]
    expected = mtp_logits(mtp_tensors(path), states, embedded(path, tokens[:, 1:]), head)
    hidden = model.hidden_states(mx.array(tokens[:, :-1]))
    assert close(model.mtp_logits(hidden, mx.array(tokens[:, 1:])), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_of_drafts_reads_the_layers_own_output_behind_its_norm(checkpoint: Checkpoint, kind: Kind) -> None:
    path, tokens, drafts = checkpoint(kind, with_mtp=True), ids(2, 12), ids(2, 15)[:, 12:]
    model, weights = load(path), mtp_tensors(path)
    _, states = transformers_states(path, tokens[:, :-1])
    head = stored_tensors(path)["lm_head.weight"]
    expected = mtp_chain(weights, states, embedded(path, tokens[:, 1:]), head, embedded(path, drafts))
    hidden, state, _ = model.step(mx.array(tokens[:, :-1]), empty_state(model.config.text, mtp=True))
    draft = model.mtp_step(hidden[:, -1:], mx.array(tokens[:, -1:]), model.mtp_memory(state))
    found = [draft.logits[:, 0]]
    for token in drafts.T:
        draft = model.mtp_step(draft.normed, mx.array(token[:, None]), draft.memory, chained=True)
        found.append(draft.logits[:, 0])
    assert draft.memory.offset == 11 + drafts.shape[1]
    assert all(close(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("bits_for", [None, {r"mtp.*(q|v)_proj": 8, r"mtp.*k_proj": "none"}], ids=["alike", "mixed"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_filling_leaves_the_keys_and_values_that_drafting_leaves(
    checkpoint: Checkpoint, tmp_path: Path, kind: Kind, bits_for: dict[str, int | str] | None
) -> None:
    """Also where the projections of queries, keys and values are packed apart."""
    convert(checkpoint(kind, with_mtp=True), tmp_path / "out", bits=4, bits_for=bits_for, progress=False)
    model = load(tmp_path / "out")
    tokens, state = mx.array(ids(2, 14)), empty_state(model.config.text, mtp=True)
    for start, end in ((0, 6), (6, 7), (7, 14)):
        state = model.step(tokens[:, start:end], state).state
    hidden = model.hidden_states(tokens[:, :-1])
    drafted = model.mtp_step(hidden, tokens[:, 1:]).memory
    assert model.mtp_memory(state).offset == drafted.offset == 13
    (found,), (expected,) = state.mtp[0].buffers(), drafted.chains[0].buffers()
    assert mx.abs(found - expected)[..., :13, :].max().item() <= 1e-5 * mx.abs(expected).max().item()


def test_a_checkpoint_without_mtp_says_so(checkpoint: Checkpoint) -> None:
    model = load(checkpoint("dense"))
    for call in (model.mtp_logits, model.mtp_step):
        with pytest.raises(ValueError, match="no MTP layer"):
            call(mx.zeros((1, 1, 64)), mx.array([[1]]))


@pytest.mark.parametrize("cuts", [[10], [1, 18, 30], [21, 27]], ids=str)
def test_its_keys_and_values_are_the_same_however_a_prompt_with_an_image_is_cut(
    checkpoint: Checkpoint, cuts: list[int]
) -> None:
    model = load(checkpoint("dense_vl", with_mtp=True))
    tokens = mx.array([[*range(20), 302, *[300] * 6, 303, *range(30, 50)]])
    pixels = mx.array(np.random.default_rng(0).standard_normal((24, 96)), mx.float32)
    fresh = empty_state(model.config.text, mtp=True)
    embedded = model.embed(tokens, [Pixels(MediaKind.IMAGE, pixels, mx.array([[1, 4, 6]]))], fresh)
    whole = model.step(tokens, fresh, embedded=embedded).state
    state = fresh
    for start, end in pairwise([0, *cuts, tokens.shape[1]]):
        state = model.step(tokens[:, start:end], state, embedded=embedded.part(start, end)).state
    found, expected = state.mtp[0].read(0), whole.mtp[0].read(0)
    assert isinstance(found, mx.array) and isinstance(expected, mx.array)
    assert state.mtp[0].length == whole.mtp[0].length == tokens.shape[1] - 1
    assert np.abs(np.array(found) - np.array(expected)).max() <= 2e-4 * np.abs(np.array(expected)).max()
