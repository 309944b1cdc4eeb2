"""What a user reads when a checkpoint's tensors are not those of its config."""

import re
from collections import Counter
from collections.abc import Iterable

from mlx_qwen.checkpoint.names import tensor_specs
from mlx_qwen.config import ModelConfig


def grouped(names: Iterable[str], most: int = 6) -> str:
    """Names with their numbers folded to N, counted: one line a kind instead of one a tensor."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "N", name) for name in names)
    lines = [f"  {name}" + (f" (×{count})" if count > 1 else "") for name, count in counts.most_common(most)]
    if len(counts) > most:
        lines.append(f"  and {len(counts) - most} more kinds")
    return "\n".join(lines)


def mismatch(config: ModelConfig, missing: list[str], unknown: list[str]) -> str:
    """What to tell when `missing` tensors are not stored or `unknown` ones are: the names, and the likely cause."""
    parts = [f"The checkpoint does not match its config.json (model_type {config.model_type})."]
    if missing:
        parts.append(f"{len(missing)} tensors are missing:\n{grouped(missing)}")
    if unknown:
        parts.append(f"{len(unknown)} tensors are not part of this model:\n{grouped(unknown)}")
    parts.append(f"Likely cause: {_likely_cause(config, missing, unknown)}")
    return "\n".join(parts)


def _likely_cause(config: ModelConfig, missing: list[str], unknown: list[str]) -> str:
    if any(name.endswith((".weight_scale_inv", ".qweight", ".weight_packed", ".weight_scale")) for name in unknown):
        return "the weights are quantized for another runtime, but config.json does not say how. Download it again."
    if unknown and not missing:
        return "the config describes a smaller model than the weights, or the folder mixes two models."
    if len(missing) >= len(tensor_specs(config)) // 2:
        return "the config belongs to another model, or most shards are missing. Download the folder again."
    if missing and not unknown:
        return "a shard is missing, or the config asks for more layers than were saved. Download the folder again."
    return "the weights and config.json belong to different models. Download the folder again."
