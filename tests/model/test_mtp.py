"""The MTP layer is loaded with the model and computes what its definition says."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model.state import KVCache
from tests.model.mtp_reference import mtp_logits
from tests.support.checkpoints import Kind, stored_tensors

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("kind", ["dense", "moe", "next"])
def test_mtp_logits_equal_an_independent_torch_version(checkpoint: Checkpoint, kind: Kind) -> None:
    path = checkpoint(kind, with_mtp=True)
    model = load_model(path, ModelConfig.from_directory(path))
    stored = stored_tensors(path)
    ids = mx.array(np.random.default_rng(0).integers(0, 299, (2, 21)))
    hidden = model.hidden_states(ids[:, :-1])
    expected = mtp_logits(
        {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")},
        torch.tensor(np.array(hidden)),
        stored["model.embed_tokens.weight"][torch.tensor(np.array(ids[:, 1:]))],
        stored["lm_head.weight"],
    ).numpy()
    at_once = np.array(model.mtp_logits(hidden, ids[:, 1:]))
    assert np.abs(at_once - expected).max() <= 2e-4 * np.abs(expected).max()
    cache = KVCache()
    pieces = [model.mtp_logits(hidden[:, a:b], ids[:, a + 1 : b + 1], cache) for a, b in ((0, 8), (8, 9), (9, 20))]
    assert np.abs(np.array(mx.concatenate(pieces, axis=1)) - expected).max() <= 2e-4 * np.abs(expected).max()


def test_a_checkpoint_without_mtp_says_so(checkpoint: Checkpoint) -> None:
    path = checkpoint("dense")
    model = load_model(path, ModelConfig.from_directory(path))
    with pytest.raises(ValueError, match="no MTP layer"):
        model.mtp_logits(mx.zeros((1, 1, 64)), mx.array([[1]]))
