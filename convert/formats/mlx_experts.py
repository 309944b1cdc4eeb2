"""Experts that are packed as MLX packs, one by one: AutoRound's export for MLX writes them under Hugging Face's names.

A module has `weight` uint32 [N, K · bits / 32], `scales` and `biases` [N, groups]. Readers want those of all experts of
a layer as one.

Source: `export_to_mlx` of https://github.com/intel/auto-round.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

from mlx_qwen.checkpoint.shards import TensorInfo
from mlx_qwen.errors import CheckpointError

from .encoded import Computed, RowReader

_PART = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.(\w+_proj)\.(weight|scales|biases)")


def stacked(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """`tensors` with the experts of a layer as one, where they are packed; raises CheckpointError for some of them."""
    found: dict[str, dict[int, TensorInfo]] = {}
    packed: set[str] = set()
    for name, info in tensors.items():
        match = _PART.fullmatch(name)
        if match is not None:
            base = f"{match[1]}switch_mlp.{match[3]}"
            found.setdefault(f"{base}.{match[4]}", {})[int(match[2])] = info
            packed |= {base} if match[4] == "weight" and info.dtype == "U32" else set()
    whole = {name: _stack(name, parts) for name, parts in found.items() if name.rpartition(".")[0] in packed}
    used = {info.name for name in whole for info in found[name].values()}
    return {name: info for name, info in tensors.items() if name not in used} | whole


def _stack(name: str, parts: Mapping[int, TensorInfo]) -> Computed:
    members = [parts[i] for i in sorted(parts)]
    first = members[0]
    if sorted(parts) != list(range(len(parts))) or len({(info.shape, info.dtype) for info in members}) > 1:
        raise CheckpointError(
            f"{first.name} in {first.file.name} and those of the layer's other experts are not packed alike, or some "
            "of them are missing. Download the folder again, or use another checkpoint of the model."
        )
    shape, nbytes = (len(members), *first.shape), sum(info.nbytes for info in members)
    files = frozenset(file for info in members for file in info.files)
    return Computed(name, first.file, first.dtype, shape, 0, nbytes, tuple(map(_reader, members)), files)


def _reader(info: TensorInfo) -> RowReader:
    def read(start: int, stop: int) -> mx.array:
        rows = info.read(start, stop)
        return rows if rows.dtype == mx.uint32 else rows.astype(mx.float32)

    return read
