"""A checkpoint folder that sees: tower, tokenizer with the image tokens, and a template that places them."""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from tokenizers import AddedToken

from mlx_qwen.loading import load
from mlx_qwen.media.grids import Grid
from mlx_qwen.model import Model
from mlx_qwen.model.vision import VisionTower
from mlx_qwen.prompt import Processor
from tests.support.tokenizers import CHAT_TEMPLATE, add_tokenizer, tiny_tokenizer

MEDIA_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TEXT_PART = "{{ part.text }}"
PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
ANY_PART = (
    "{%- if part.type == 'image' %}" + PLACE + "{%- elif part.type == 'video' %}" + PLACE.replace("image", "video")
    + "{%- else %}{{ part.text }}{%- endif %}"
)  # fmt: skip


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with a vision tower whose images, and videos, have 64 to 4,096 pixels. Do not write into it."""
    from tests.support.checkpoints import tiny_checkpoint

    folder = tiny_checkpoint(tmp_path_factory.mktemp("seeing"), "dense_vl")
    assert TEXT_PART in CHAT_TEMPLATE
    add_tokenizer(folder, template=CHAT_TEMPLATE.replace(TEXT_PART, ANY_PART))
    tokenizer = tiny_tokenizer()
    fillers = [AddedToken(f"<|filler_{i}|>", special=True) for i in range(300 - tokenizer.get_vocab_size())]
    tokenizer.add_special_tokens([*fillers, *(AddedToken(token, special=True) for token in MEDIA_TOKENS)])
    assert tokenizer.token_to_id("<|image_pad|>") == 300
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def seeing(seeing_folder: Path) -> tuple[Model, Processor]:
    """Model and processor of `seeing_folder`; no token ends an answer."""
    model, processor = load(seeing_folder)
    processor.end_token_ids = frozenset()
    return model, processor


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[Grid]]:
    """The grids of every run of the tower."""
    runs: list[list[Grid]] = []
    original = VisionTower.__call__

    def counted(self: VisionTower, pixel_values: mx.array, grids: list[Grid]) -> mx.array:
        runs.append(list(grids))
        return original(self, pixel_values, grids)

    monkeypatch.setattr(VisionTower, "__call__", counted)
    return runs
