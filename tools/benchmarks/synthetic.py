"""Checkpoints of any shape with random weights, in Hugging Face layout: for benchmarks and demonstrations."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlx_qwen.checkpoint.names import VISION_PREFIX, Role, tensor_specs, text_prefix
from mlx_qwen.checkpoint.shards import INDEX_NAME
from mlx_qwen.config import ModelConfig
from mlx_qwen.convert.writing.writer import Entry, SafetensorsWriter

_PIECE_BYTES = 16 << 20


def write_random_checkpoint(config: ModelConfig, folder: Path, *, seed: int = 0) -> None:
    """Write `config.json` and random bf16 weights of every tensor that `config` asks for.

    Names, shapes and dtypes are those of the released checkpoints, with fused experts. Values are of magnitude 2^-7 to
    2^-5 (fp32 ones 0 to 1), and the same seed gives the same bytes. `folder` must not hold weights yet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries = list(_stored_entries(config))
    generator = np.random.default_rng(seed)
    with SafetensorsWriter(folder, "model", entries) as writer:
        for entry in entries:
            for first_byte in range(0, entry.nbytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, entry.nbytes - first_byte)
                writer.write(entry.name, _random_bytes(entry.dtype, size, generator), first_byte)
        writer.finish()
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in entries)}, "weight_map": writer.weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config.raw, indent=2) + "\n", encoding="utf-8")


def _stored_entries(config: ModelConfig) -> Iterator[Entry]:
    for spec in tensor_specs(config):
        name, shape = _stored_name(spec.name, config), spec.shape
        if spec.role is Role.EXPERT:
            mlp, _, projection = name.partition(".switch_mlp.")
            if projection == "up_proj.weight":
                continue
            if projection == "gate_proj.weight":
                yield Entry(f"{mlp}.experts.gate_up_proj", "BF16", (shape[0], 2 * shape[1], shape[2]))
            else:
                yield Entry(f"{mlp}.experts.down_proj", "BF16", shape)
        elif spec.role is Role.CONV:
            yield Entry(name, "BF16", (shape[0], shape[2], shape[1]))
        elif len(shape) == 5:
            yield Entry(name, "BF16", (shape[0], shape[4], *shape[1:4]))
        else:
            exact = name.endswith((".A_log", ".linear_attn.norm.weight"))
            yield Entry(name, "F32" if exact else "BF16", shape)


def _stored_name(name: str, config: ModelConfig) -> str:
    prefix = text_prefix(config)
    if name.startswith(VISION_PREFIX):
        return f"model.visual.{name.removeprefix(VISION_PREFIX)}"
    if prefix and name.startswith(f"{prefix}model."):
        return f"model.language_model.{name.removeprefix(f'{prefix}model.')}"
    return name.removeprefix(prefix)


def _random_bytes(dtype: str, size: int, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    if dtype == "F32":
        return generator.random(size // 4, dtype=np.float32).view(np.uint8)
    bits = generator.integers(0, 1 << 16, size // 2, dtype=np.uint16)
    # Sign, mantissa and the lowest exponent bit stay random; the rest of the exponent is fixed.
    return ((bits & 0x80FF) | 0x3C00).view(np.uint8)
