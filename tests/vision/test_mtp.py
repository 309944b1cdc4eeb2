"""The MTP layer counts positions as the model does, also behind images and videos."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from mlx_qwen.model.multimodal import pixels_of
from mlx_qwen.model.state import empty_state
from tests.model.mtp_reference import mtp_logits, norm
from tests.support.checkpoints import stored_tensors
from tests.vision.prompts import conversations, ours


def test_logits_over_images_and_behind_them_equal_an_independent_torch_version(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("dense_vl", with_mtp=True)
    model, stored = load_model(path, ModelConfig.from_directory(path)), stored_tensors(path)
    prompt, later = conversations()["mixed"], [5, 9, 4]
    given, cache, memory = ours(prompt), model.make_cache(), model.mtp_memory()
    pixels = pixels_of(*map(given.get, ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")))
    embedded = model.embed(mx.array([prompt.ids]), pixels, cache)
    hidden = [model.hidden_states(mx.array([prompt.ids]), cache, embedded=embedded)]
    draft = model.mtp_step(hidden[0], mx.array([[*prompt.ids[1:], later[0]]]), memory, embedded=embedded)
    found = [draft.logits]
    assert cache.rope_delta is not None
    for token, following in pairwise(later):
        hidden.append(model.hidden_states(mx.array([[token]]), cache))
        draft = model.mtp_step(hidden[-1], mx.array([[following]]), draft.memory)
        found.append(draft.logits)
    next_embeddings = mx.concatenate([embedded.embeddings[:, 1:], model.embed_tokens(mx.array([later]))], axis=1)
    first = int(embedded.axes.max()) + 1
    positions = np.concatenate([embedded.axes[:, 0], [[first, first + 1]] * 3], axis=1)
    expected = mtp_logits(
        {name: tensor for name, tensor in stored.items() if name.startswith("mtp.")},
        norm(torch.tensor(np.array(mx.concatenate(hidden, axis=1))), stored["model.language_model.norm.weight"]),
        torch.tensor(np.array(next_embeddings)),
        stored["lm_head.weight"],
        torch.tensor(positions),
    ).numpy()
    assert np.abs(np.array(mx.concatenate(found, axis=1)) - expected).max() <= 2e-4 * np.abs(expected).max()


def test_filling_in_pieces_that_end_within_an_image_leaves_what_one_piece_leaves(
    checkpoint: Callable[..., Path],
) -> None:
    """But for the key of the pair that a piece begins with: its place within the image is taken to be the last."""
    path = checkpoint("dense_vl", with_mtp=True)
    model, prompt = load_model(path, ModelConfig.from_directory(path)), conversations()["mixed"]
    given, empty = ours(prompt), empty_state(model.config.text, mtp=True)
    pixels = pixels_of(*map(given.get, ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")))
    embedded, tokens = model.embed(mx.array([prompt.ids]), pixels, empty), mx.array([prompt.ids])
    within = prompt.ids.index(model.config.image_token_id) + 1
    assert prompt.ids[within] == model.config.image_token_id
    whole = model.step(tokens, empty, embedded=embedded).state
    pieces = empty_state(model.config.text, mtp=True)
    for start, end in ((0, within), (within, len(prompt.ids))):
        pieces = model.step(tokens[:, start:end], pieces, embedded=embedded.part(start, end)).state
    assert pieces.mtp[0].length == whole.mtp[0].length == len(prompt.ids) - 1
    (found,), (expected,) = pieces.mtp[0].buffers(), whole.mtp[0].buffers()
    same = np.arange(found.shape[3]) != within - 1
    assert np.allclose(np.array(found)[:, :, :, same], np.array(expected)[:, :, :, same], rtol=1e-4, atol=1e-5)
    assert np.allclose(np.array(found)[1], np.array(expected)[1], rtol=1e-4, atol=1e-5)
