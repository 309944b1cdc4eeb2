"""Checkpoints in the formats of other runtimes, written from their definitions, beside what they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlx_qwen.config import ModelConfig
from mlx_qwen.loading import load_model
from tests.support.checkpoints import reference_logits, stored_tensors

Values = npt.NDArray[np.float32]
Encoder = Callable[[Tensor], tuple[dict[str, Tensor], Values]]
"""From a weight [N, K] to what is stored, by the part of the name after the module's, and what that stands for."""

INPUT_IDS = [[5, 117, 42, 42, 260, 9, 31, 208, 77, 150, 3]]
_ENCODED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj")
_ENCODED += ("in_proj_qkv", "in_proj_z", "in_proj_qkvz")


def every_projection(name: str) -> bool:
    """Whether published checkpoints quantize this tensor: matrices of mixers and MLPs, but no gate and no head."""
    return name.removesuffix(".weight").endswith(_ENCODED) and "visual" not in name and not name.startswith("mtp.fc")


def foreign_checkpoint(
    source: Path,
    folder: Path,
    settings: dict[str, object],
    encode: Encoder,
    *,
    chosen: Callable[[str], bool] = every_projection,
) -> tuple[Path, Path]:
    """Encode the `chosen` tensors of `source`; returns that checkpoint and one in fp32 with the values it stands for.

    `settings` are the `quantization_config`.
    """
    encoded, decoded = {}, {}
    for name, tensor in stored_tensors(source).items():
        if chosen(name):
            parts, values = encode(tensor.float())
            encoded |= {f"{name.removesuffix('weight')}{part}": array for part, array in parts.items()}
            decoded[name] = torch.from_numpy(values)
        else:
            encoded[name] = decoded[name] = tensor
    config = json.loads((source / "config.json").read_text())
    return (
        _write(source, folder / "foreign", encoded, {**config, "quantization_config": settings}),
        _write(source, folder / "plain", decoded, config),
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the tensors of a single-file checkpoint after `change` had its way with them."""
    tensors = stored_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def assert_reference_logits(converted: Path, plain: Path) -> None:
    """Our fp32 model of the folder `converted` has the logits of transformers' model of the checkpoint `plain`."""
    expected = reference_logits(plain, torch.tensor(INPUT_IDS)).numpy()
    actual = logits(converted)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


def logits(converted: Path) -> Values:
    """What our model of the folder `converted` makes of the same prompt, [1, T, V]."""
    model = load_model(converted, ModelConfig.from_directory(converted))
    return np.array(model(mx.array(INPUT_IDS)).astype(mx.float32))


def _write(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    folder.mkdir(parents=True)
    for file in source.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
