"""transformers' video processor without torchvision, whose two operations on pixels are plain torch here."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, image_processing_backends, video_processing_utils
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor


class PlainTorch:
    """What torchvision's `resize` and `normalize` do to uint8 and float videos [..., C, H, W]."""

    class InterpolationMode:
        BILINEAR = BICUBIC = LANCZOS = "bicubic"

    @staticmethod
    def resize(video: torch.Tensor, size: tuple[int, int], *, interpolation: object, antialias: bool) -> torch.Tensor:
        flat = video.flatten(0, -4)
        resized = torch.nn.functional.interpolate(flat, size, mode="bicubic", antialias=antialias)
        return resized.reshape(*video.shape[:-2], *size)

    @staticmethod
    def normalize(video: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, *, inplace: bool) -> torch.Tensor:
        mean, std = (torch.as_tensor(x).view(-1, 1, 1) for x in (mean, std))
        return (video - mean) / std


class Reference:
    """`Qwen3VLVideoProcessor` with the areas and patches of a test."""

    modes: ClassVar[dict[int, str]] = {3: "bicubic"}

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
        for module in (image_processing_backends, video_processing_utils):
            monkeypatch.setattr(module, "tvF", PlainTorch, raising=False)
        monkeypatch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", self.modes, raising=False)
        monkeypatch.setattr(Qwen3VLProcessor, "check_argument_for_proper_class", lambda *_: None)
        settings = {"cap_pixels_per_frame": False, **settings}
        self.processor = Qwen3VLVideoProcessor(**settings, do_convert_rgb=False, return_metadata=True)

    def __call__(self, frames: np.ndarray, rate: float, **options: object) -> tuple[np.ndarray, list[int], list[int]]:
        """Patches, grid and indices of the sampled frames, of uint8 frames [T, H, W, 3]."""
        found = self.processor([frames], video_metadata=[metadata(frames, rate)], return_tensors="np", **options)
        indices = found["video_metadata"][0].frames_indices
        return found["pixel_values_videos"], found["video_grid_thw"][0].tolist(), indices.tolist()

    def ids(self, folder: Path, text: str, frames: np.ndarray, rate: float) -> list[int]:
        """Token ids of a text with one video, by the tokenizer in `folder`."""
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        processor = Qwen3VLProcessor(Qwen2VLImageProcessorPil(), tokenizer, self.processor)
        options = {"video_metadata": [metadata(frames, rate)]}
        ids: list[int] = processor(text=[text], videos=[frames], videos_kwargs=options)["input_ids"][0]
        return ids


def metadata(frames: np.ndarray, rate: float) -> dict[str, float]:
    """What transformers wants to know about a video besides its frames."""
    return {"total_num_frames": len(frames), "fps": rate}
