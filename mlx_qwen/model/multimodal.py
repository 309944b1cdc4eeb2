"""Prompts that hold images or videos: features in the places of their placeholders, and positions of every token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_qwen.config import ModelConfig
from mlx_qwen.errors import PromptError
from mlx_qwen.media.grids import Grid, Kind, read_grids
from mlx_qwen.model.mrope import rope_positions

See = Callable[[mx.array, Sequence[Grid]], mx.array]


@dataclass(frozen=True, slots=True)
class Embedded:
    """A prompt as the decoder takes it: `embeddings` [B, T, hidden] and positions `axes`, int [3, B, T].

    `before` [3, B, 1] is the place of the token in front of a part; None for a whole prompt.
    """

    embeddings: mx.array
    axes: np.ndarray
    before: np.ndarray | None = None

    def part(self, start: int, end: int) -> "Embedded":
        """Tokens start to end."""
        before = self.axes[:, :, start - 1 : start] if start else self.before
        return Embedded(self.embeddings[:, start:end], self.axes[:, :, start:end], before)

    def rope_delta(self, seen: int) -> tuple[int, ...]:
        """What each row's next position is ahead of a count of `seen` tokens, these included."""
        return tuple((self.axes.max(axis=(0, 2)) + 1 - seen).tolist())


@dataclass(frozen=True, slots=True)
class Pixels:
    """Patches [N, channels · temporal_patch_size · patch_size²] of images or videos, and their grids [n, 3]."""

    kind: Kind
    values: mx.array
    grid_thw: mx.array


def pixels_of(
    pixel_values: mx.array | None,
    image_grid_thw: mx.array | None,
    pixel_values_videos: mx.array | None,
    video_grid_thw: mx.array | None,
) -> list[Pixels]:
    """The pixels that are given, images first; raises PromptError for patches without grids, or grids alone."""
    found = []
    for kind, values, grid_thw in (
        (Kind.IMAGE, pixel_values, image_grid_thw),
        (Kind.VIDEO, pixel_values_videos, video_grid_thw),
    ):
        if (values is None) != (grid_thw is None):
            raise PromptError(f"Pixels and grids of an {kind.name.lower()} belong together: pass both, or neither.")
        if values is not None and grid_thw is not None:
            found.append(Pixels(kind, values, grid_thw))
    return found


def token_kinds(input_ids: np.ndarray, config: ModelConfig) -> np.ndarray:
    """A Kind for every token of int [B, T]."""
    kinds = np.full(input_ids.shape, Kind.TEXT, np.int64)
    kinds[input_ids == config.image_token_id] = Kind.IMAGE
    kinds[input_ids == config.video_token_id] = Kind.VIDEO
    return kinds


def merge_features(
    embeddings: mx.array, kinds: np.ndarray, pixels: Sequence[Pixels], see: See, merge: int
) -> tuple[mx.array, dict[Kind, list[Grid]]]:
    """Put features into the places of their placeholders.

    Args:
        embeddings: [B, T, hidden], of all tokens.
        kinds: int [B, T], a Kind for every token.
        pixels: of the images and of the videos.
        see: turns them into features [N / merge², hidden], as the vision tower does.
        merge: side of the squares of patches that became one token.

    Returns:
        The embeddings, and the grids of images and of the videos' temporal pairs, in order.

    Raises:
        PromptError: the number of placeholders is not that of the features.
    """
    grids: dict[Kind, list[Grid]] = {Kind.IMAGE: [], Kind.VIDEO: []}
    B, T, hidden = embeddings.shape
    flat = embeddings.reshape(B * T, hidden)
    for given in pixels:
        listed = read_grids(given.grid_thw, merge)
        _check_patches(given, listed)
        by_frame = [frame for grid in listed for frame in grid.by_frame()]
        grids[given.kind] = by_frame if given.kind is Kind.VIDEO else listed
    for kind, expected in grids.items():
        _check_placeholders(kind, int((kinds == kind).sum()), sum(grid.tokens(merge) for grid in expected))
    for given in pixels:
        features = see(given.values, grids[given.kind])
        flat[mx.array(np.flatnonzero(kinds == given.kind))] = features.astype(flat.dtype)
    return flat.reshape(B, T, hidden), grids


def positions(
    kinds: np.ndarray, grids: dict[Kind, list[Grid]], merge: int, start: np.ndarray, mask: np.ndarray | None
) -> np.ndarray:
    """Positions int [3, B, T] of tokens whose first stands at `start` [] or [B]; 0 where `mask` [B, T] is False."""
    coming = {kind: iter(listed) for kind, listed in grids.items()}
    starts = np.broadcast_to(start, kinds.shape[:1])
    axes = np.zeros((3, *kinds.shape), np.int64)
    for row, first in enumerate(starts):
        real = slice(None) if mask is None else mask[row]
        axes[:, row, real] = rope_positions(kinds[row, real], coming, merge, start=int(first))
    return axes


def _check_patches(given: Pixels, grids: Sequence[Grid]) -> None:
    patches = sum(grid.patches for grid in grids)
    if patches != given.values.shape[0]:
        raise PromptError(
            f"pixel_values hold {given.values.shape[0]:,} patches, but the grids ask for {patches:,}. Pass both as the "
            "image processor returned them."
        )


def _check_placeholders(kind: Kind, found: int, expected: int) -> None:
    if found != expected:
        name = kind.name.lower()
        raise PromptError(
            f"The prompt has {found:,} {name} placeholders, but the {name}s given need {expected:,}. Pass one {name} "
            "for each place in the prompt, or let the chat template set the placeholders."
        )
