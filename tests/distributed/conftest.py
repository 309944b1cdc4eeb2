"""The model that ranks divide."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen.demo import demo_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in fp32, in which sums of halves, and states that were read back, round too little to change a token."""
    made = Path(shutil.copytree(demo_folder(), tmp_path_factory.mktemp("demo") / "fp32"))
    for file in made.glob("*.safetensors"):
        weights, metadata = mx.load(str(file), return_metadata=True)
        wide = {name: part.astype(mx.float32) if part.dtype == mx.bfloat16 else part for name, part in weights.items()}
        mx.eval(wide)
        mx.save_safetensors(str(file), wide, metadata)
    config = made / "config.json"
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    return made
