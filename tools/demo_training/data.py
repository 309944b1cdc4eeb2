"""Batches as tensors: the generated batches of some 8,000 tokens, taken a few rows at a time."""

from functools import lru_cache

import numpy as np
import torch

from tools.demo_training.batches import PARTS, batch
from tools.demo_training.model import Batch
from tools.demo_training.tokenizer import token_id

PATCHES_A_PLACEHOLDER = 4
BREVITY = 0.6


def load(kind: str, seed: int, draw: int, worker: int = 0, workers: int = 1) -> Batch:
    """What `worker` trains on when it draws a kind for the time `draw`: one of the parts of a generated
    batch, whose other parts are the draws around it; no two workers share any."""
    return _sliced(_generated(kind, seed, draw // PARTS * workers + worker), draw % PARTS)


def _sliced(arrays: dict[str, np.ndarray], part: int) -> Batch:
    rows = {
        name: torch.from_numpy(np.ascontiguousarray(arrays[name][..., part::PARTS, :]))
        for name in ("input_ids", "labels", "position_ids")
    }
    rows["weights"] = answer_weights(rows["labels"])
    if "pixel_values" not in arrays:
        return Batch(**rows, pixels=None, grids=[])
    wanted = arrays["row_of_picture"] % PARTS == part
    pixels = arrays["pixel_values"][np.repeat(wanted, arrays["grid_thw"].prod(1))]
    grids = [(int(height), int(width)) for _, height, width in arrays["grid_thw"][wanted]]
    return Batch(**rows, pixels=torch.from_numpy(pixels), grids=grids)


def answer_weights(labels: torch.Tensor) -> torch.Tensor:
    """float32 [B, T]: the longer the answer a label belongs to, the less it counts, or lists would drown single words.

    An answer is a run of labels in int64 [B, T] that follow each other.
    """
    learnt = (labels >= 0).int()
    first = torch.diff(learnt, dim=1, prepend=torch.zeros_like(learnt[:, :1])) == 1
    answer = first.flatten().cumsum(0) * learnt.flatten()
    return answer.bincount()[answer].float().pow(-BREVITY).view(labels.shape)


@lru_cache(maxsize=8)
def _generated(kind: str, seed: int, index: int) -> dict[str, np.ndarray]:
    arrays = batch(kind, seed, index)
    if "grid_thw" in arrays:
        arrays["row_of_picture"] = _rows_of_pictures(arrays)
    return arrays


def _rows_of_pictures(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Which row each picture stands in, as pictures fill the placeholders of the rows in order."""
    media = [token_id(name) for name in ("<|image_pad|>", "<|video_pad|>")]
    filled = np.isin(arrays["input_ids"], media).sum(1).cumsum() * PATCHES_A_PLACEHOLDER
    ends = arrays["grid_thw"].prod(1).cumsum()
    rows: np.ndarray = np.searchsorted(filled, ends)
    return rows
