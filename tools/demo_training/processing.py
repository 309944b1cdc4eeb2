"""What a Hugging Face folder holds beside the model: tokenizer, chat template, generation and processor settings."""

import json
import shutil
from pathlib import Path

from tools.demo_training.tokenizer import END_OF_TEXT, END_OF_TURN, HERE, TOKENIZER_FILE, demo_tokenizer

# Areas in pixels: a picture of 3 x 3 cells of 32 pixels at most, and eight frames of it.
LEAST_AREA, PICTURE_AREA, FRAMES = 64 * 64, 96 * 96, 8
TOKENIZER = {
    "tokenizer_class": "Qwen2TokenizerFast",
    "eos_token": END_OF_TURN,
    "pad_token": END_OF_TEXT,
    "bos_token": None,
    "unk_token": None,
    "add_bos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 4096,
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "processor_class": "Qwen3VLProcessor",
}
_PATCHES: dict[str, object] = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
IMAGES = {
    "size": {"shortest_edge": LEAST_AREA, "longest_edge": PICTURE_AREA},
    **_PATCHES,
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEOS = {
    "size": {"shortest_edge": LEAST_AREA, "longest_edge": FRAMES * PICTURE_AREA},
    **_PATCHES,
    "cap_pixels_per_frame": True,
    "max_video_tokens": PICTURE_AREA // 32**2,
    "fps": 2,
    "min_frames": 4,
    "max_frames": FRAMES,
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def write_processor_files(folder: Path) -> None:
    """Writes all of them into `folder`, which is made if needed; decoding is greedy unless a caller says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER_FILE, folder / "tokenizer.json")
    shutil.copy(HERE / "chat_template.jinja", folder / "chat_template.jinja")
    end, pad = (demo_tokenizer().token_to_id(token) for token in (END_OF_TURN, END_OF_TEXT))
    generation = {"do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    for name, content in (
        ("tokenizer_config.json", TOKENIZER),
        ("generation_config.json", generation),
        ("preprocessor_config.json", IMAGES),
        ("video_preprocessor_config.json", VIDEOS),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
