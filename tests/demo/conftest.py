"""The demo's processor, as its checkpoint folder gives it."""

import json
from pathlib import Path

import pytest

from mlx_qwen.config import ModelConfig
from mlx_qwen.prompt import Processor
from tools.demo_training.architecture import TEXT, VISION
from tools.demo_training.processing import write_processor_files
from tools.demo_training.tokenizer import demo_tokenizer


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("demo")
    write_processor_files(folder)
    ids = {f"{kind}_token_id": demo_tokenizer().token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")}
    config = {"model_type": "qwen3_5_moe", "text_config": TEXT, "vision_config": VISION, **ids}
    (folder / "config.json").write_text(json.dumps(config))
    return Processor.from_directory(folder, ModelConfig.from_directory(folder))


@pytest.fixture(scope="session")
def template() -> str:
    return (Path(__file__).parents[2] / "tools/demo_training/chat_template.jinja").read_text()
