"""M-RoPE positions and deltas are transformers', for text, images and videos."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Grid, Kind
from mlx_qwen.model.mrope import rope_positions
from mlx_qwen.model.multimodal import Embedded
from tests.support.checkpoints import reference_model
from tests.vision.prompts import IMAGE, VIDEO, Prompt, conversations, type_ids

Checkpoint = Callable[..., Path]


def positions(prompt: Prompt, start: int = 0) -> np.ndarray:
    ids = np.array(prompt.ids)
    kinds = np.where(ids == IMAGE, Kind.IMAGE, np.where(ids == VIDEO, Kind.VIDEO, Kind.TEXT))
    frames = [frame for video in prompt.videos for frame in video.by_frame()]
    return rope_positions(kinds, {Kind.IMAGE: iter(prompt.images), Kind.VIDEO: iter(frames)}, 2, start=start)


def test_positions_and_deltas_equal_transformers(checkpoint: Checkpoint) -> None:
    reference = reference_model(checkpoint("dense_vl")).model
    for name, prompt in conversations().items():
        grids = {"image_grid_thw": prompt.images, "video_grid_thw": prompt.videos}
        expected, delta = reference.get_rope_index(  # type: ignore[operator, union-attr]
            torch.tensor(prompt.input_ids),
            type_ids(prompt.input_ids),
            **{key: torch.tensor(value) for key, value in grids.items() if value},
        )
        found = positions(prompt)
        assert (found == expected[:, 0].numpy()).all(), name
        assert Embedded(mx.zeros(1), found[:, None]).rope_delta(len(prompt.ids)) == tuple(delta[0].tolist()), name


def test_positions_go_on_from_any_start() -> None:
    prompt = conversations()["mixed"]
    assert (positions(prompt, start=100) == positions(prompt) + 100).all()


def test_images_without_text_between_them_are_told_apart() -> None:
    kinds = np.full(4 + 2, Kind.IMAGE)
    grids = iter([Grid(1, 4, 4), Grid(1, 2, 4)])
    found = rope_positions(kinds, {Kind.IMAGE: grids, Kind.VIDEO: iter([])}, 2)
    assert found[0].tolist() == [0, 0, 0, 0, 2, 2]
    assert found[2].tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("grids", [[], [Grid(1, 4, 4)]])
def test_placeholders_that_fit_no_image_are_refused(grids: list[Grid]) -> None:
    with pytest.raises(PromptError, match="placeholders"):
        rope_positions(np.full(3, Kind.IMAGE), {Kind.IMAGE: iter(grids), Kind.VIDEO: iter([])}, 2)
