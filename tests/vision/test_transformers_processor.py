"""The processor that transformers makes of a published checkpoint reads a prompt with pictures as this package does."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor
from transformers.video_utils import load_video

import mlx_qwen
from mlx_qwen.demo import DEMO_FOLDER
from mlx_qwen.media.images import ImageProcessor
from mlx_qwen.model import Model
from mlx_qwen.options import GenerationOptions
from mlx_qwen.prompt import Processor
from mlx_qwen.prompt.inputs import prompt_inputs
from tests.support.checkpoints import reference_model
from tests.vision.drawing import drawing
from tests.vision.films import film, video_file
from tools.export_demo import export

pytest.importorskip("torchvision")

LEVEL = 2 / 255  # values run from -1 to 1
MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


@dataclass
class Question:
    """A video file and an image between texts, and what transformers' own processor makes of them.

    `theirs` is without the pair of marks that transformers 5.10 and later leave around all frames of a video.
    """

    video: Path
    image: Image.Image
    theirs: dict[str, torch.Tensor]

    def ours(self, processor: Processor) -> tuple[list[int], dict[str, mx.array]]:
        """Token ids, and keywords of the model for the pictures."""
        read = prompt_inputs(processor, messages(self.video, self.image), GenerationOptions(enable_thinking=False))
        assert read.images is not None and read.videos is not None
        return read.ids, {
            "pixel_values": read.images.pixel_values, "image_grid_thw": read.images.grid_thw,
            "pixel_values_videos": read.videos.pixel_values, "video_grid_thw": read.videos.grid_thw,
        }  # fmt: skip


def messages(video: Path, image: Image.Image) -> list[dict[str, object]]:
    content = ["Look: ", {"type": "video", "video": str(video)}, " and ", {"type": "image", "image": image}, "what?"]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def seeing() -> tuple[Model, Processor]:
    return mlx_qwen.load(dtype=mx.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("published")
    export(DEMO_FOLDER, folder)
    return folder


@pytest.fixture(scope="module", params=[(64, 96), (70, 90)], ids=["kept", "resized"])
def asked(request: pytest.FixtureRequest, published: Path, tmp_path_factory: pytest.TempPathFactory) -> Question:
    """With pictures of multiples of 32 pixels, which are kept as they are, or of others, which are resized."""
    width, height = request.param
    video = video_file(tmp_path_factory.mktemp("film") / "a.mp4", film(12, height, width), rate=8)
    image = drawing(height, width)
    # By its class, as mlx-vlm, once another test has imported it, takes AutoProcessor's place.
    theirs = Qwen3VLProcessor.from_pretrained(published)
    frames, about = load_video(str(video), backend="pyav")
    text = theirs.apply_chat_template(messages(video, image), add_generation_prompt=True, enable_thinking=False)
    read = theirs(
        text=[text], images=[image], videos=[frames], videos_kwargs={"video_metadata": [about]}, return_tensors="pt"
    )
    return Question(video, image, without_outer_pair(dict(read), theirs))


def without_outer_pair(read: dict[str, torch.Tensor], processor: Qwen3VLProcessor) -> dict[str, torch.Tensor]:
    """Keywords of a prompt whose first medium is a video, without the marks before its first time and behind its last
    frame."""
    start, end, pad = processor.vision_start_token_id, processor.vision_end_token_id, processor.video_token_id
    ids = read["input_ids"][0].tolist()
    last = len(ids) - 1 - ids[::-1].index(pad)
    outer = [ids.index(start), last + 2]
    assert (ids[outer[0]], ids[outer[0] + 1] == pad, ids[last + 1 : last + 3]) == (start, False, [end, end])
    kept = [place for place in range(len(ids)) if place not in outer]
    return {name: x[:, kept] if x.shape[:2] == (1, len(ids)) else x for name, x in read.items()}


def test_ids_timestamps_grids_and_patches_equal_transformers(asked: Question, seeing: tuple[Model, Processor]) -> None:
    ids, media = asked.ours(seeing[1])
    assert ids == asked.theirs["input_ids"][0].tolist()
    assert "<0.2 seconds>" in seeing[1].decode(ids)
    resized = asked.image.width % 32 > 0
    for name in MEDIA:
        found, expected = np.array(media[name]), asked.theirs[name].numpy()
        assert np.abs(found - expected).max() <= (LEVEL if resized else 0) * ("pixel" in name) + 1e-6


# A pixel rounded to the next of 255 levels would move logits more than all arithmetic does.
@pytest.mark.parametrize("asked", [(64, 96)], ids=["kept"], indirect=True)
def test_logits_equal_transformers_from_files_to_the_last_layer(
    asked: Question, seeing: tuple[Model, Processor], published: Path
) -> None:
    ids, media = asked.ours(seeing[1])
    found = np.array(seeing[0](mx.array([ids]), **media))
    with torch.no_grad():
        expected = reference_model(published)(**asked.theirs, use_cache=False).logits.numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("low", "high"), [(65536, 16777216), (1024, 4096), (1024, 100_000)])
def test_images_are_within_2_levels_of_what_torchvision_resizes_and_4_of_a_thin_one(low: int, high: int) -> None:
    theirs = Qwen2VLImageProcessor(
        patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, size={"shortest_edge": low, "longest_edge": high}
    )
    ours = ImageProcessor(min_pixels=low, max_pixels=high)
    for size, levels in (((64, 64), 0), ((97, 33), 2), ((31, 32), 2), ((640, 480), 1), ((200, 1), 1), ((5, 900), 4)):
        expected, found = theirs(images=[drawing(*size)], return_tensors="np"), ours([drawing(*size)])
        assert [list(grid) for grid in found.grids] == expected["image_grid_thw"].tolist()
        assert np.abs(np.array(found.pixel_values) - expected["pixel_values"]).max() <= levels * LEVEL + 1e-6
