"""transformers' own video processor, and what it is told about a video."""

import numpy as np
import pytest
from transformers import Qwen3VLVideoProcessor


class Reference:
    """`Qwen3VLVideoProcessor` with the areas and patches of a test."""

    def __init__(self, **settings: object) -> None:
        pytest.importorskip("torchvision")
        settings = {"cap_pixels_per_frame": False, **settings}
        self.processor = Qwen3VLVideoProcessor(**settings, do_convert_rgb=False, return_metadata=True)

    def __call__(self, frames: np.ndarray, rate: float) -> tuple[np.ndarray, list[int], list[int]]:
        """Patches, grid and indices of the sampled frames, of uint8 frames [T, H, W, 3]."""
        found = self.processor([frames], video_metadata=[metadata(frames, rate)], return_tensors="np")
        indices = found["video_metadata"][0].frames_indices
        return found["pixel_values_videos"], found["video_grid_thw"][0].tolist(), indices.tolist()


def metadata(frames: np.ndarray, rate: float) -> dict[str, float]:
    """What transformers wants to know about a video besides its frames."""
    return {"total_num_frames": len(frames), "fps": rate}
