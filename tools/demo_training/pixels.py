"""Pictures as the vision tower reads them: drawn at some scale, resized to 32 pixels a cell, cut into patches."""

import numpy as np
from PIL import Image

from mlx_qwen.demo.tasks.drawing import draw_clip, draw_scene
from mlx_qwen.demo.tasks.example import Clip
from mlx_qwen.demo.tasks.scenes import Scene

PATCH, MERGE = 16, 2
# A byte's value after the processor's scaling and normalisation, each step rounded as there.
_NORMALISED = (np.arange(256, dtype=np.float32) * np.float32(1 / 255) - np.float32(0.5)) / np.float32(0.5)


def scene_pixels(scene: Scene, scale: int) -> np.ndarray:
    """uint8 [H, W, 3] of a scene drawn at `scale` and resized to the model's size."""
    return _resized(draw_scene(scene, scale), scale)


def clip_pixels(clip: Clip, scale: int) -> np.ndarray:
    """uint8 [frames, H, W, 3] of a clip."""
    return np.stack([_resized(frame, scale) for frame in draw_clip(clip, scale)])


def _resized(image: Image.Image, scale: int) -> np.ndarray:
    if scale != 1:
        image = image.resize((image.width // scale, image.height // scale), Image.Resampling.BICUBIC)
    return np.asarray(image)


def patches(frames: np.ndarray) -> np.ndarray:
    """fp32 [patches, 3 · 2 · 16 · 16] of frames, uint8 [2n, H, W, 3]: channel, time, row, column of each patch; the
    patches of a merged square follow each other."""
    T, H, W, C = frames.shape
    rows, columns = H // (PATCH * MERGE), W // (PATCH * MERGE)
    squares = frames.reshape(T // 2, 2, rows, MERGE, PATCH, columns, MERGE, PATCH, C)
    ordered = squares.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(T // 2 * H * W // PATCH**2, -1)
    normalised: np.ndarray = _NORMALISED[ordered]
    return normalised


def scene_patches(scene: Scene, scale: int) -> np.ndarray:
    """Patches of a still picture, which fills both frames of its temporal patch."""
    return patches(np.repeat(scene_pixels(scene, scale)[None], 2, axis=0))
