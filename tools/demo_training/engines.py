"""The demo in this runtime and in transformers, as functions from a batch of questions to logits."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen.model import Model
from mlx_qwen.model.multimodal import pixels_of
from tools.demo_training.grading import Batch, Engine

_MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def runtime(model: Model) -> Engine:
    """This package's model."""

    def logits(batch: Batch) -> np.ndarray:
        media: dict[str, Any] = {name: mx.array(array) for name, array in _media(batch).items()}
        return np.array(model(mx.array(batch.ids), **media).astype(mx.float32))

    return logits


def transformers_from(folder: Path) -> Engine:
    """transformers' model in fp32, loaded from a Hugging Face folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    image, video = model.config.image_token_id, model.config.video_token_id

    def logits(batch: Batch) -> np.ndarray:
        kinds = np.where(batch.ids == image, 1, np.where(batch.ids == video, 2, 0))
        arrays = {"input_ids": batch.ids, "mm_token_type_ids": kinds, **_media(batch)}
        with torch.no_grad():
            outputs = model(**{name: torch.from_numpy(array) for name, array in arrays.items()})
        found: np.ndarray = outputs.logits.numpy()
        return found

    return logits


def accepted_drafts(model: Model, batch: Batch) -> tuple[int, int]:
    """In how many places of the answers the MTP layer guesses the token that the model takes, and how many there are.

    At each token it reads the model's state and the token that follows, and guesses the one after it.
    """
    ids = mx.array(batch.ids)
    media = {name: mx.array(array) for name, array in _media(batch).items()}
    pixels = pixels_of(*(media.get(name) for name in _MEDIA))
    cache = model.make_cache()
    embedded = model.embed(ids, pixels, cache) if pixels else None
    hidden = model.hidden_states(ids, cache, embedded=embedded)
    taken = np.array(mx.argmax(model.logits(hidden), axis=-1))
    following = mx.concatenate([ids[:, 1:], ids[:, -1:]], axis=1)
    drafts = np.array(mx.argmax(model.mtp_logits(hidden, following, embedded=embedded), axis=-1))
    # Token t's draft is for t + 2, which the model takes from its logits at t + 1.
    counted = batch.graded[:, 2:]
    return int(((drafts[:, :-2] == taken[:, 1:-1]) & counted).sum()), int(counted.sum())


def _media(batch: Batch) -> dict[str, np.ndarray]:
    arrays = (batch.pixels, batch.grids, batch.clip_pixels, batch.clip_grids)
    return {name: array for name, array in zip(_MEDIA, arrays, strict=True) if array.size}
