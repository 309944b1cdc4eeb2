"""What an MLX checkpoint should hold, worked out from a Hugging Face one by rules written here, and what it holds."""

import hashlib
import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from torch import Tensor

from tests.support.checkpoints import stored_tensors

Arrays = dict[str, mx.array]
SHIFTED = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")


def main_arrays(folder: Path) -> Arrays:
    """The tensors of `model*.safetensors`, which every MLX runtime reads."""
    return _load(sorted(folder.glob("model*.safetensors")))


def companion_arrays(folder: Path) -> Arrays:
    """The tensors of `mlx-qwen*.safetensors`."""
    return _load(sorted(folder.glob("mlx-qwen*.safetensors")))


def expected_arrays(path: Path) -> dict[str, Tensor]:
    """Every tensor of the Hugging Face checkpoint at `path`, MTP too, as MLX lays it out; norms are fp32 factors."""
    text_only_prefix = "" if "next" in _config(path)["model_type"] else "language_model."
    tied = _config(path).get("tie_word_embeddings", False)
    tensors: dict[str, Tensor] = {}
    for stored, tensor in stored_tensors(path).items():
        if not (tied and stored == "lm_head.weight"):
            tensors |= _renamed(stored, tensor, text_only_prefix)
    return _stacked(tensors)


def equal(actual: mx.array, expected: Tensor) -> bool:
    """Whether both hold the same numbers (compared in fp32, which holds bf16 and fp16 exactly)."""
    as_tensor = torch.from_numpy(np.array(actual.astype(mx.float32)))
    return as_tensor.shape == expected.shape and torch.equal(as_tensor, expected.float())


def dequantized(arrays: Arrays, name: str, bits: int) -> mx.array:
    """What MLX's packed matrix `name` stands for, in fp32."""
    weight, base = arrays[name], name.removesuffix(".weight")
    scales, biases = (arrays[f"{base}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(
        weight, scales, biases, group_size=weight.shape[-1] * 32 // bits // scales.shape[-1], bits=bits
    )


def digests(folder: Path) -> dict[str, str]:
    """A checksum of every file in the folder."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def _renamed(stored: str, tensor: Tensor, prefix: str) -> dict[str, Tensor]:
    name = stored
    if stored.startswith("model.visual."):
        name = stored.replace("model.visual.", "vision_tower.", 1)
    elif stored.startswith("model.language_model."):
        name = stored.replace("model.language_model.", f"{prefix}model.", 1)
    elif not stored.startswith("mtp."):
        name = prefix + stored
    if name.endswith(SHIFTED) or (name.startswith("mtp.") and "norm" in name):
        tensor = tensor.float() + 1
    elif name.endswith("conv1d.weight"):
        tensor = tensor.permute(0, 2, 1)
    elif tensor.ndim == 5:
        tensor = tensor.permute(0, 2, 3, 4, 1)
    if name.endswith("experts.gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        base = name.replace("experts.gate_up_proj", "switch_mlp")
        return {f"{base}.gate_proj.weight": gate, f"{base}.up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {name.replace("experts.down_proj", "switch_mlp.down_proj.weight"): tensor}
    return {name: tensor}


def _stacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with those of single experts stacked along a new leading axis."""
    whole: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.)experts\.(\d+)\.(.*)", name)
        if match is None:
            whole[name] = tensor
        else:
            experts.setdefault(f"{match[1]}switch_mlp.{match[3]}", {})[int(match[2])] = tensor
    return whole | {name: torch.stack([parts[i] for i in range(len(parts))]) for name, parts in experts.items()}


def _config(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((path / "config.json").read_text())
    return config


def _load(files: list[Path]) -> Arrays:
    arrays: Arrays = {}
    for file in files:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        arrays |= loaded
    return arrays
