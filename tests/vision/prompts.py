"""Prompts with images and videos for the tiny checkpoints, as transformers and this package take them."""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
import torch

from mlx_qwen.media.grids import Grid

IMAGE, VIDEO, START, END = 300, 301, 302, 303
PATCH_PIXELS = 96


@dataclass
class Prompt:
    """Token ids and the grids of what they hold; pixels are random."""

    ids: list[int] = field(default_factory=list)
    images: list[Grid] = field(default_factory=list)
    videos: list[Grid] = field(default_factory=list)

    def text(self, n: int) -> "Prompt":
        """n tokens of text."""
        self.ids += [(7 * i + len(self.ids)) % 290 + 3 for i in range(n)]
        return self

    def image(self, rows: int, columns: int) -> "Prompt":
        """An image of rows x columns patches."""
        self.images.append(Grid(1, rows, columns))
        self.ids += [START, *[IMAGE] * (rows * columns // 4), END]
        return self

    def video(self, frames: int, rows: int, columns: int) -> "Prompt":
        """A video of `frames` temporal pairs, with text in front of each as timestamps are."""
        self.videos.append(Grid(frames, rows, columns))
        for _ in range(frames):
            self.text(3)
            self.ids += [START, *[VIDEO] * (rows * columns // 4), END]
        return self

    @property
    def input_ids(self) -> np.ndarray:
        return np.array([self.ids])


def pixels(grids: list[Grid]) -> np.ndarray:
    """Random patches of the given grids."""
    total = sum(grid.patches for grid in grids)
    return np.random.default_rng(total).uniform(-1, 1, (total, PATCH_PIXELS)).astype(np.float32)


def ours(*prompts: Prompt) -> dict[str, mx.array]:
    """Keywords of `Model.__call__` for the media of the prompts, row after row."""
    images, videos = [g for p in prompts for g in p.images], [g for p in prompts for g in p.videos]
    given: dict[str, mx.array] = {}
    if images:
        given |= {"pixel_values": mx.array(pixels(images)), "image_grid_thw": mx.array(images)}
    if videos:
        given |= {"pixel_values_videos": mx.array(pixels(videos)), "video_grid_thw": mx.array(videos)}
    return given


def theirs(*prompts: Prompt) -> dict[str, torch.Tensor]:
    """The same, for transformers' model."""
    return {name: torch.tensor(np.array(value)) for name, value in ours(*prompts).items()}


def type_ids(ids: np.ndarray) -> torch.Tensor:
    """transformers' `mm_token_type_ids`."""
    return torch.tensor(np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0)))


def conversations() -> dict[str, Prompt]:
    """Prompts of several shapes."""
    return {
        "image_first": Prompt().image(4, 6).text(5),
        "one_image": Prompt().text(4).image(6, 4).text(7),
        "smallest": Prompt().text(2).image(2, 2).text(3),
        "wide": Prompt().text(3).image(2, 30).text(6),
        "several": Prompt().text(3).image(4, 4).text(2).image(2, 8).image(6, 2).text(9),
        "video": Prompt().text(3).video(3, 4, 4).text(5),
        "mixed": Prompt().text(3).image(4, 6).video(2, 4, 4).text(3).image(2, 4).text(5),
        "image_last": Prompt().text(5).image(4, 4),
    }


def without_media_tokens(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor, as a random model would write placeholders too."""
    ids = mx.arange(logits.shape[-1])
    return mx.where((ids >= IMAGE) & (ids <= END), -mx.inf, logits)
