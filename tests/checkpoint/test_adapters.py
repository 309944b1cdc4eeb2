"""An adapter that is not merged into its model is refused with the way to merge it, never loaded without it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mlx_qwen import load
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert import convert
from mlx_qwen.errors import MLXQwenError
from mlx_qwen.loading import load_model
from tests.conftest import CheckpointFactory
from tests.support.foreign import edit_tensors


def test_an_adapters_folder_is_told_how_to_become_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen3.5-0.8B", "r": 8}))
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    save_file({name: torch.zeros(8, 64)}, folder / "adapter_model.safetensors")
    for read in (lambda: convert(folder, tmp_path / "out"), lambda: load(folder)):
        with pytest.raises(MLXQwenError, match=r"its base is Qwen/Qwen3\.5-0\.8B\. Merge it first.*merge_and_unload"):
            read()


@pytest.mark.parametrize("part", ["base_layer.weight", "lora_A.default.weight"])
def test_layers_with_an_unmerged_adapter_are_refused(part: str, checkpoint: CheckpointFactory, tmp_path: Path) -> None:
    source = shutil.copytree(checkpoint("dense"), tmp_path / "source")

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        module = next(name for name in tensors if name.endswith("layers.0.mlp.up_proj.weight")).removesuffix("weight")
        tensors[module + part] = tensors[module + "weight"].clone()
        if part.startswith("base_layer"):
            del tensors[module + "weight"]

    edit_tensors(source, wrap)
    for read in (
        lambda: convert(source, tmp_path / "out"),
        lambda: load_model(source, ModelConfig.from_directory(source)),
    ):
        with pytest.raises(MLXQwenError, match=r"up_proj\.(base_layer|lora_A).*not merged.*merge_and_unload"):
            read()
